// Drives every endpoint with the official client and prints what came, as JSON by name. What it
// ought to be is known to test_openai_node.py, which runs this.
import OpenAI from "openai";

const { baseURL, model, messages, schema, tools } = JSON.parse(process.env.TAEL_CLIENT_TEST);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const greedy = { model, temperature: 0 };
const format = { type: "json_schema", json_schema: { name: "x", schema, strict: true } };
const functions = tools.map((tool) => ({ type: "function", function: tool }));
const flat = tools.map((tool) => ({ type: "function", strict: null, ...tool }));

async function all(stream) {
  const parts = [];
  for await (const part of await stream) parts.push(part);
  return parts;
}

async function failure(call) {
  try {
    await call();
    return null;
  } catch (error) {
    const { status, code, param, type } = error;
    return { name: error.constructor.name, status, code, param, type };
  }
}

const chat = (body) => client.chat.completions.create({ ...greedy, messages, ...body });
const text = (body) => client.completions.create({ ...greedy, prompt: "abc", ...body });
const respond = (body) => client.responses.create({ ...greedy, input: "Say hi", ...body });
const usage = { include_usage: true };

const calls = {
  models: async () => (await all(client.models.list())).map((entry) => entry.id),
  model: () => client.models.retrieve(model),
  chat: () => chat({ max_completion_tokens: 12, n: 2, logprobs: true, top_logprobs: 2 }),
  chatStream: () => all(chat({ max_tokens: 12, stream: true, stream_options: usage })),
  chatHelper: async () =>
    (await client.chat.completions.stream({ ...greedy, messages, max_tokens: 12 }).finalChatCompletion()),
  chatSchema: () => chat({ response_format: format }),
  chatSchemaStream: () => all(chat({ response_format: format, stream: true })),
  chatTools: () => chat({ tools: functions, tool_choice: "required" }),
  chatToolsStream: () => all(chat({ tools: functions, tool_choice: "required", stream: true })),
  text: () => text({ max_tokens: 8, logprobs: 2, echo: true }),
  textStream: () => all(text({ max_tokens: 8, stream: true, stream_options: usage })),
  textIds: () => text({ prompt: [[1, 2, 3], [4, 5]], max_tokens: 4 }),
  responses: () => respond({ max_output_tokens: 12, instructions: "Be brief." }),
  responsesStream: () => all(respond({ max_output_tokens: 12, stream: true })),
  responsesSchema: () => respond({ text: { format: { type: "json_schema", name: "x", schema } } }),
  responsesTools: () => respond({ tools: flat, tool_choice: "required" }),
  responsesToolsStream: () =>
    client.responses.stream({ ...greedy, input: "Say hi", tools: flat, tool_choice: "required" }).finalResponse(),
  noModel: () => failure(() => chat({ model: "gpt-4" })),
  noMessages: () => failure(() => chat({ messages: [] })),
  unknownParameter: () => failure(() => respond({ reasoning: { effort: "low" } })),
  tooLong: () => failure(() => text({ prompt: "x".repeat(300), stream: true })),
  embeddings: () => failure(() => client.embeddings.create({ model, input: "abc" })),
  stopped: async () => {
    const stream = await text({ max_tokens: 200, stream: true });
    for await (const _ of stream) break; // which aborts the request
    return stream.controller.signal.aborted;
  },
};

const results = {};
for (const [name, call] of Object.entries(calls)) results[name] = (await call()) ?? null;
console.log(JSON.stringify(results));
