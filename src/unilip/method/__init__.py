"""The method: networks, condition, losses and sampling of UniLIP (arXiv 2507.23278) in torch alone, the plain way.

Read: config, text, encoder, qwen2, mllm, connector, decoder, dit, flow, model. Speed stands beside it: `unilip.fast`.
"""
