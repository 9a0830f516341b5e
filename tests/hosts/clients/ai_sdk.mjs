// Vercel's AI SDK with openai() as it comes (the Responses API), and with .chat and .image.
import fs from "node:fs";
import assert from "node:assert";
import { createOpenAI } from "@ai-sdk/openai";
import { experimental_generateImage, generateImage, generateText, streamText } from "ai";

const [url, path] = process.argv.slice(2);
const openai = createOpenAI({ apiKey: "none", baseURL: url });
const messages = [{ role: "user", content: [
  { type: "text", text: "What is in the picture?" }, { type: "image", image: fs.readFileSync(path) },
] }];
const { text, response } = await generateText({ model: openai("unilip"), messages });
const more = [...messages, ...response.messages, { role: "user", content: "What color is the background?" }];
const next = await generateText({ model: openai("unilip"), messages: more });  // which names the answer by its id
assert.ok(next.text);
let streamed = "";
for await (const piece of streamText({ model: openai("unilip"), messages }).textStream) streamed += piece;
assert.equal(streamed, text);
const chat = await generateText({ model: openai.chat("unilip"), messages });
const draw = generateImage ?? experimental_generateImage;
const { image } = await draw({ model: openai.image("unilip"), prompt: "three yellow stars", size: "512x512" });
assert.equal(Buffer.from(image.base64, "base64").subarray(1, 4).toString(), "PNG");
const { version } = JSON.parse(fs.readFileSync(new URL("./node_modules/ai/package.json", import.meta.url)));
console.log(JSON.stringify({ version, answer: text, chat: chat.text, next: next.text }));
