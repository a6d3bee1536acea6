// openai-node.
import OpenAI from "openai";
import { apiKey, baseURL, check, images, model, question, refused } from "./scene.mjs";

const client = new OpenAI({ baseURL, apiKey });
let messages;
for (const [form, url] of Object.entries(images)) {
  messages = [{ role: "user", content: [{ type: "text", text: question }, { type: "image_url", image_url: { url } }] }];
  const answer = (await client.chat.completions.create({ model, messages })).choices[0].message;
  check(form, answer.content);
  const turns = [...messages, answer, ...messages];
  check(`${form}, second turn`, (await client.chat.completions.create({ model, messages: turns })).choices[0].message.content);
  const options = { stream: true, stream_options: { include_usage: true } };
  let said = "";
  let tokens = 0;
  for await (const chunk of await client.chat.completions.create({ model, messages, ...options })) {
    said += chunk.choices[0]?.delta.content ?? "";
    tokens = chunk.usage?.total_tokens ?? tokens;
  }
  check(`${form}, streamed`, said);
  if (!tokens) throw new Error("no usage");
}
check("stream helper", await client.chat.completions.stream({ model, messages }).finalContent());
const names = [];
for await (const item of await client.models.list()) names.push(item.id);
for (const name of [...names, model]) if ((await client.models.retrieve(name)).id !== name) throw new Error(name);

const tools = [{ type: "function", function: { name: "f", parameters: { type: "object", properties: {} } } }];
const create = (fields) => () => client.chat.completions.create({ model, messages, ...fields });
await refused("model", create({ model: "gpt-4o" }), "no such model");
await refused("tools", create({ tools }), "tools are not supported");
await refused("structured output", create({ response_format: { type: "json_object" } }), "structured output is not");
await refused("responses", () => client.responses.create({ model, input: "Hi" }), "404", "/v1/chat/completions");
