"use strict";

// Everything that comes from the server or the user is shown as text, never as HTML.
const at = (id) => document.getElementById(id);
let running = null;

function made(tag, text = "", className = "") {
  const node = document.createElement(tag);
  node.textContent = text;
  if (className) node.className = className;
  return node;
}

function headers() {
  const key = at("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function problem(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with ${response.status}.`;
  }
}

async function showModels() {
  const response = await fetch("v1/models", { headers: headers() });
  at("keyed").hidden = at("keyed").hidden && response.status !== 401;
  if (!response.ok) {
    status(response.status === 401 ? "Give the server's API key." : await problem(response), true);
    return;
  }
  const { data } = await response.json();
  at("models").replaceChildren(...data.map((model, i) => {
    const label = made("label");
    const box = made("input");
    box.type = "checkbox";
    box.value = model.id;
    box.checked = i < 3;
    label.append(box, made("span", model.parent === null ? `${model.id} (base)` : model.id));
    return label;
  }));
  at("chatting").hidden = !data[0].chat;
  at("chat").checked = data[0].chat;
  at("filter").hidden = data.length < 12;
  status("");
}

function status(text, failed = false) {
  at("status").textContent = text;
  at("status").className = failed ? "failed" : "";
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function answer(model, asked, chat, signal) {
  const card = made("article");
  const text = made("pre");
  const note = made("p", "waiting");
  card.append(made("h2", model), text, note);
  at("answers").append(card);
  const began = performance.now();
  const path = chat ? "v1/chat/completions" : "v1/completions";
  try {
    const body = JSON.stringify({ ...asked, model });
    const response = await fetch(path, { method: "POST", headers: headers(), body, signal });
    if (!response.ok) throw new Error(await problem(response));
    let first = 0;
    let usage = null;
    for await (const part of events(response.body)) {
      if (part.error) throw new Error(part.error.message);
      if (part.usage) usage = part.usage;
      const said = part.choices[0];
      if (!said) continue;
      first = first || performance.now() - began;
      text.append(chat ? said.delta.content ?? "" : said.text);
      if (said.finish_reason) note.textContent = said.finish_reason === "length" ? "cut off" : "ended";
    }
    const seconds = (performance.now() - began) / 1000;
    const count = usage ? `${usage.completion_tokens} tokens` : "";
    note.textContent += `, ${count}, first after ${first.toFixed(0)} ms, all after ${seconds.toFixed(1)} s`;
  } catch (error) {
    note.textContent = error.name === "AbortError" ? "stopped" : error.message;
    note.className = error.name === "AbortError" ? "" : "failed";
  }
}

async function send(event) {
  event.preventDefault();
  const models = [...at("models").querySelectorAll("input:checked")].map((box) => box.value);
  if (!models.length) {
    status("Choose at least one model.", true);
    return;
  }
  status("");
  const chat = at("chat").checked && !at("chatting").hidden;
  const prompt = at("prompt").value;
  const asked = {
    ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
    max_tokens: Number(at("tokens").value),
    temperature: Number(at("temperature").value),
    ...(at("seed").value ? { seed: Number(at("seed").value) } : {}),
    stream: true,
    stream_options: { include_usage: true },
  };
  at("answers").replaceChildren();
  running = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  await Promise.all(models.map((model) => answer(model, asked, chat, running.signal)));
  at("send").disabled = false;
  at("stop").disabled = true;
}

at("form").addEventListener("submit", send);
at("stop").addEventListener("click", () => running?.abort());
at("key").addEventListener("change", showModels);
at("filter").addEventListener("input", () => {
  for (const label of at("models").children) label.hidden = !label.textContent.includes(at("filter").value);
});
showModels().catch(() => status("The server does not answer.", true));
