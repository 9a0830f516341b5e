"""The method: UniLIP's networks, condition, losses and sampling in torch alone, the plain way (arXiv 2507.23278).

Read in this order: config, text, encoder, qwen2, mllm, connector, decoder, dit, flow, model.
Speed and memory stand beside it, in `unilip.fast`, and are tested equal to it.
"""
