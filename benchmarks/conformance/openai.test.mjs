// OpenAI's npm client against a running server: what it reads, what it raises, what it tries again.
// BASE_URL, KEY and the METRICS address come from the environment.

import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";

const { BASE_URL, KEY, METRICS } = process.env;
const client = new OpenAI({ baseURL: BASE_URL, apiKey: KEY, maxRetries: 0 });
const greedy = { model: "model", temperature: 0 };
const words = [{ role: "user", content: "w300;w301;" }];

async function running() {
  const text = await (await fetch(METRICS, { headers: { authorization: `Bearer ${KEY}` } })).text();
  return Number(/^fanformer_answers_running\{.*\} (\d+)$/m.exec(text)[1]);
}

test("completions, whole and streamed, are the same text with its usage", async () => {
  const asked = { ...greedy, prompt: "w300;w301;", max_tokens: 12, logprobs: 2 };
  const whole = await client.completions.create(asked);
  assert.equal(whole.choices[0].logprobs.tokens.length, whole.usage.completion_tokens);
  const stream = await client.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } });
  let text = "";
  let usage = null;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.text ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].text);
  assert.equal(usage.total_tokens, whole.usage.total_tokens);
});

test("token ids and lists of texts are prompts too", async () => {
  const asked = { ...greedy, max_tokens: 4 };
  const ids = await client.completions.create({ ...asked, prompt: [0, 300, 301] });
  assert.equal(ids.usage.prompt_tokens, 3);
  const one = await client.completions.create({ ...asked, prompt: "w300;w301;" });
  const several = await client.completions.create({ ...asked, prompt: ["w300;w301;", "w302;"], n: 2 });
  const texts = several.choices.sort((a, b) => a.index - b.index).map((choice) => choice.text);
  assert.equal(texts.length, 4);
  assert.deepEqual(texts.slice(0, 2), [one.choices[0].text, one.choices[0].text]);
});

test("chat completions, whole and streamed, are the same text", async () => {
  const asked = { ...greedy, messages: words, max_completion_tokens: 12, logprobs: true, top_logprobs: 2, seed: 1 };
  const whole = await client.chat.completions.create(asked);
  assert.equal(whole.choices[0].logprobs.content[0].top_logprobs.length, 2);
  const runner = client.chat.completions.stream(asked);
  assert.equal(await runner.finalContent(), whole.choices[0].message.content);
});

test("models are listed and described", async () => {
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  assert.deepEqual(names, ["model"]);
  assert.equal((await client.models.retrieve("model")).capabilities.chat, true);
});

test("errors come with their class, code and param", async () => {
  const wrong = (fields) => client.completions.create({ ...greedy, prompt: "a", ...fields });
  await assert.rejects(wrong({ model: "other" }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.deepEqual([error.code, error.param], ["model_not_found", "model"]);
    return true;
  });
  await assert.rejects(wrong({ prompt: "w300;".repeat(3000) }), { code: "context_length_exceeded", status: 400 });
  await assert.rejects(wrong({ temperature: 9 }), { param: "temperature", status: 400 });
  await assert.rejects(wrong({ suffix: "b" }), { param: "suffix", code: "unsupported_parameter" });
  const image = { type: "image_url", image_url: { url: "https://example.org/a.png" } };
  const shown = { ...greedy, messages: [{ role: "user", content: [image] }] };
  await assert.rejects(client.chat.completions.create(shown), { code: "unsupported_content", status: 400 });
  const stranger = new OpenAI({ baseURL: BASE_URL, apiKey: "sk-wrong", maxRetries: 0 });
  await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
});

test("a stream that is aborted frees its slot", async () => {
  const long = { ...greedy, prompt: "w300;", max_tokens: 900, min_tokens: 900, stream: true };
  const stream = await client.completions.create(long);
  for await (const _ of stream) break; // which aborts
  for (let turn = 0; (await running()) > 0; turn++) {
    assert.ok(turn < 600, "the slot is still taken");
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
});
