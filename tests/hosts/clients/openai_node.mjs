// openai-node: chat with a picture, drawing, editing, a stream with pictures on the way, responses.
import fs from "node:fs";
import assert from "node:assert";
import OpenAI, { toFile } from "openai";

const [url, path] = process.argv.slice(2);
const client = new OpenAI({ apiKey: "none", baseURL: url });
const picture = fs.readFileSync(path);
const data = "data:image/png;base64," + picture.toString("base64");
const messages = [{ role: "user", content: [
  { type: "text", text: "What is in the picture?" }, { type: "image_url", image_url: { url: data } },
] }];
const chat = await client.chat.completions.create({ model: "unilip", messages });
const drawn = await client.images.generate({ model: "unilip", prompt: "three yellow stars" });
assert.equal(Buffer.from(drawn.data[0].b64_json, "base64").subarray(1, 4).toString(), "PNG");
const image = await toFile(picture, "panda.png", { type: "image/png" });
const edited = await client.images.edit({ model: "unilip", image, prompt: "make the background pink" });
const kinds = [];
for await (const event of await client.images.generate(
  { model: "unilip", prompt: "a cat", stream: true, partial_images: 1 },
)) kinds.push(event.type);
assert.deepEqual(kinds, ["image_generation.partial_image", "image_generation.completed"]);
const said = await client.responses.create({ model: "unilip", input: "What animal says moo?" });
const { version } = JSON.parse(fs.readFileSync(new URL("./node_modules/openai/package.json", import.meta.url)));
console.log(JSON.stringify({
  version, answer: chat.choices[0].message.content, edited: edited.data.length, responses: said.output_text,
}));
