// openai-node.
import OpenAI from "openai";
import { apiKey, baseURL, check, images, model, question, held, refused } from "./scene.mjs";

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

const schema = { type: "object", properties: { kind: { type: "string" }, sides: { type: "integer" } }, required: ["kind", "sides"] };
const create = (fields) => () => client.chat.completions.create({ model, messages, ...fields });
await refused("model", create({ model: "gpt-4o" }), "no such model");
const tools = [{ type: "function", function: { name: "shape", parameters: schema } }];
const call = (await create({ tools, tool_choice: "required" })()).choices[0].message.tool_calls[0];
held("tools", JSON.parse(call.function.arguments));
const format = { type: "json_schema", json_schema: { name: "shape", schema } };
held("structured output", JSON.parse((await create({ response_format: format })()).choices[0].message.content));
const content = [{ type: "input_image", image_url: images.data, detail: "auto" }, { type: "input_text", text: question }];
const first = await client.responses.create({ model, input: [{ role: "user", content }] });
check("responses", first.output_text);
const next = await client.responses.create({ model, input: question, previous_response_id: first.id });
check("responses, second turn", next.output_text);
let streamed = "";
for await (const event of await client.responses.create({ model, input: [{ role: "user", content }], stream: true })) {
  if (event.type === "response.output_text.delta") streamed += event.delta;
}
check("responses, streamed", streamed);
