// Vercel's AI SDK: as an OpenAI-compatible server, and as OpenAI's chat. URLs it fetches itself, from public hosts only.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";
import { apiKey, baseURL, check, file, images, model, question, held } from "./scene.mjs";

const openai = createOpenAI({ baseURL, apiKey });
const compatible = createOpenAICompatible({ name: "lookonce", baseURL, apiKey, supportsStructuredOutputs: true }).chatModel(model);
const sources = { bytes: file, data: images.data };
for (const [name, chat] of [["compatible", compatible], ["openai chat", openai.chat(model)]]) {
  let messages;
  for (const [form, image] of Object.entries(sources)) {
    messages = [{ role: "user", content: [{ type: "text", text: question }, { type: "image", image }] }];
    const answer = await generateText({ model: chat, messages });
    check(`${name}, ${form}`, answer.text);
    const turns = [...messages, ...answer.response.messages, ...messages];
    check(`${name}, ${form}, second turn`, (await generateText({ model: chat, messages: turns })).text);
    const stream = streamText({ model: chat, messages });
    let said = "";
    for await (const text of stream.textStream) said += text;
    check(`${name}, ${form}, streamed`, said);
  }
}
const messages = [{ role: "user", content: [{ type: "text", text: question }, { type: "image", image: file }] }];
const schema = z.object({ kind: z.string(), sides: z.number().int() });
for (const [name, own] of [["compatible", compatible], ["openai chat", openai.chat(model)], ["openai", openai(model)]]) {
  held(`${name}, generateObject`, (await generateObject({ model: own, messages, schema })).object);
  const tools = { shape: tool({ description: "A shape.", inputSchema: schema }) };
  const { toolCalls } = await generateText({ model: own, messages, tools, toolChoice: "required" });
  held(`${name}, tools`, toolCalls[0].input);
}
check("openai (responses)", (await generateText({ model: openai(model), messages })).text);
const stream = streamText({ model: openai(model), messages });
let said = "";
for await (const text of stream.textStream) said += text;
check("openai (responses), streamed", said);
