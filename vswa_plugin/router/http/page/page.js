"use strict";
// Names come from workers and clients: they enter the page as text only, never as markup.

const EVERY_MS = 2000;
const TIERS = ["device", "host", "disk"];
const OUTCOMES = { "under way": "under way", kept: "kept", over: "reused less", under: "reused more", unreported: "not reported" };
const $ = (id) => document.getElementById(id);
let before = null; // the answer before, for rates
let open = new Set(); // choices whose candidates are shown

function el(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "left" || name === "width") made.style[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const number = (value) => value.toLocaleString("en");
const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
const percent = (part, whole) => `${(Math.floor((1000 * part) / whole) / 10).toFixed(1)} %`;
const sum = (values) => values.reduce((total, value) => total + value, 0);
const rankName = (of) => `${of.worker_id}/${of.dp_rank}`;

async function ask(path, body) {
  const headers = {};
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = `Bearer ${token}`;
  const given = body === undefined ? { headers } : { headers, method: "POST", body: JSON.stringify(body) };
  const answer = await fetch(path, { ...given, cache: "no-store" });
  $("login").hidden = answer.status !== 401;
  const said = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(said.error || `${path}: ${answer.status} ${answer.statusText}`);
  return said;
}

// -- numbers ---------------------------------------------------------------------------------------

function promises(of) {
  const compared = of.exact + of.over + of.under;
  return compared ? percent(of.exact, compared) : "–";
}

function added(all) {
  const total = {};
  for (const one of all) for (const [name, count] of Object.entries(one)) total[name] = (total[name] || 0) + count;
  return total;
}

function tile(name, value, small) {
  return el("div", {}, el("dt", {}, name), el("dd", {}, value, el("small", {}, small || "\u00a0")));
}

function rate(now) {
  const received = (answer) => sum(answer.models.map((model) => model.received || 0));
  const seconds = before ? now.now - before.now : 0;
  const came = before ? received(now) - received(before) : 0;
  return seconds > 0 && came >= 0 ? `${(came / seconds).toFixed(1)} a second` : "";
}

function showNumbers(now) {
  const all = added(now.models.map((model) => model.promises));
  const ranks = sum(now.models.map((model) => model.ranks));
  const live = sum(now.models.map((model) => model.live_ranks));
  const compared = (all.exact || 0) + (all.over || 0) + (all.under || 0);
  const tiles = [tile("ranks live", `${live} of ${ranks}`, now.models.map((model) => model.name).join(", "))];
  if (now.models.some((model) => model.received !== null)) {
    const received = sum(now.models.map((model) => model.received || 0));
    const flight = sum(now.models.map((model) => model.in_flight || 0));
    tiles.push(tile("requests", number(received), `${number(flight)} under way ${rate(now) && "· " + rate(now)}`));
  }
  tiles.push(tile("promises kept", compared ? promises(all) : "–", compared ? `of ${plural(compared, "request")}, in whole blocks` : "no request has ended yet"));
  tiles.push(tile("tokens reused", number(all.reused_tokens || 0), `${number(all.promised_tokens || 0)} promised`));
  const windows = Object.entries(now.index.blocks).map(([window, count]) => `${window}: ${number(count)}`);
  tiles.push(tile("distinct blocks", number(sum(Object.values(now.index.blocks))), windows.join(" · ")));
  if (now.replicas) tiles.push(tile("other routers", number(now.replicas), "share their load"));
  $("numbers").replaceChildren(...tiles);
}

// -- workers ---------------------------------------------------------------------------------------

function held(window) {
  return sum(Object.values(window.resident));
}

function windowRow(window, fullest) {
  const total = held(window);
  const scale = window.capacity || fullest;
  const parts = TIERS.filter((tier) => window.resident[tier]).map((tier) =>
    el("i", { class: tier, width: `${(100 * window.resident[tier]) / Math.max(scale, total)}%` }));
  const device = window.resident.device || 0;
  const figure = window.capacity ? `${number(device)} / ${number(window.capacity)} · ${Math.round((100 * device) / window.capacity)} %` : number(total);
  const words = TIERS.filter((tier) => window.resident[tier]).map((tier) => `${number(window.resident[tier])} on ${tier}`).join(", ") || "nothing";
  const label = `window ${window.window}: holds ${words}` + (window.capacity ? `, of ${number(window.capacity)} blocks` : "");
  return el("div", { class: "row" }, el("span", {}, window.window),
    el("span", { class: window.capacity ? "bar" : "bar relative", role: "img", "aria-label": label, title: label }, ...parts),
    el("span", {}, figure));
}

function rankCard(rank, fullest) {
  const compared = rank.promises.exact + rank.promises.over + rank.promises.under;
  const card = el("article", { class: rank.state === "live" ? "rank" : "rank trouble" },
    el("h3", {}, el("span", { class: "id" }, rankName(rank)), el("span", { class: `pill ${rank.state}` }, rank.state), el("span", { class: "faint" }, rank.model)),
    el("p", { class: "faint" }, [rank.mode, `${rank.engine} ${rank.engine_version}`.trim(), rank.rule].join(" · ")));
  if (rank.reason) card.append(el("p", { class: "note" }, rank.reason));
  card.append(...rank.windows.map((window) => windowRow(window, fullest[window.window])));
  if (rank.pool_capacity) {
    const total = sum(rank.windows.map((window) => window.resident.device || 0));
    card.append(windowRow({ window: "pool", resident: { device: total }, capacity: rank.pool_capacity }, total));
  }
  const load = rank.load;
  const does = `${plural(load.requests, "request")} · ${number(load.prefill_tokens)} tokens to compute · ${plural(load.blocks, "block")} in use`;
  const kept = compared ? `promises kept: ${promises(rank.promises)} of ${number(compared)}` : "no promise compared yet";
  card.append(el("p", { class: "faint" }, does, el("br"), kept));
  return card;
}

function showWorkers(now) {
  const fullest = {};
  for (const rank of now.ranks) for (const window of rank.windows) fullest[window.window] = Math.max(fullest[window.window] || 1, held(window));
  const cards = now.ranks.map((rank) => rankCard(rank, fullest));
  if (!cards.length) cards.push(el("p", {}, "No worker is in the registry. Start one: vswa worker --help"));
  if (now.left_out) cards.push(el("p", { class: "faint" }, `${number(now.left_out)} more ranks are not shown; all are in /workers.`));
  $("workers").replaceChildren(...cards);
}

// -- choices ---------------------------------------------------------------------------------------

function candidates(choice) {
  const rows = choice.candidates.map((one) =>
    el("tr", { class: rankName(one) === rankName(choice) ? "chosen" : "" },
      el("td", { class: "id" }, rankName(one)), el("td", {}, number(one.cached_tokens)), el("td", {}, number(one.load.requests)),
      el("td", {}, number(one.load.prefill_tokens)), el("td", {}, one.cost.toFixed(1))));
  const heads = ["rank", "would reuse", "requests", "to compute", "cost"].map((name) => el("th", { scope: "col" }, name));
  const key = `${choice.request_id} ${choice.phase} ${choice.at}`;
  const made = el("details", open.has(key) ? { open: "" } : {}, el("summary", {}, choice.of > choice.candidates.length ? `the cheapest of ${choice.of} ranks` : plural(choice.of, "rank")),
    el("table", {}, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows)));
  made.addEventListener("toggle", () => (made.open ? open.add(key) : open.delete(key)));
  return made;
}

function choiceCard(choice) {
  const missed = Math.abs(choice.error_blocks);
  const outcome = OUTCOMES[choice.outcome] + (missed ? ` by ${plural(missed, "block")}` : "");
  const reused = choice.reused_tokens === null ? "" : `, reused ${number(choice.reused_tokens)}`;
  const phase = choice.phase === "agg" ? "" : `${choice.phase} · `;
  return el("article", { class: "choice" },
    el("h3", {}, el("span", { class: "id" }, rankName(choice)), el("span", { class: `pill ${choice.outcome.split(" ").pop()}` }, outcome),
      el("span", { class: "faint" }, `${new Date(1000 * choice.at).toLocaleTimeString()} · ${phase}${choice.model} · ${choice.request_id}`)),
    el("p", { class: "figures" }, `${plural(choice.prompt_tokens, "prompt token")}: promised ${number(choice.promised_tokens)}${reused}`),
    el("p", {}, choice.reason), candidates(choice));
}

function showChoices(now) {
  const cards = now.choices.map(choiceCard);
  if (!cards.length) cards.push(el("p", {}, "No choice yet: send a request to the frontend."));
  $("choices").replaceChildren(...cards);
}

// -- a prompt, explained -----------------------------------------------------------------------------

function strip(group, rankAnswer, tokens) {
  const size = group.group[2];
  const at = (block) => `${Math.min(100, (100 * block * size) / tokens)}%`;
  const piece = (kind, first, end) => el("i", { class: kind, left: at(first), width: `max(2px, ${Math.min(100, (100 * (end - first) * size) / tokens)}%)` });
  const pieces = group.held.map(([first, end]) => piece("held", first, end));
  if (group.needed) pieces.push(piece("needed", ...group.needed));
  if (group.spoilt !== null) pieces.push(piece("missing", group.spoilt, group.spoilt + 1));
  if (rankAnswer.cached_tokens) pieces.push(el("i", { class: "edge", left: `calc(${Math.min(100, (100 * rankAnswer.cached_tokens) / tokens)}% - 2px)` }));
  const runs = group.held.map(([first, end]) => (end - first === 1 ? `${first}` : `${first} to ${end - 1}`)).join(", ") || "none";
  const words = `holds blocks ${runs}` + (group.spoilt === null ? "" : `; block ${group.spoilt} is missing for the next boundary`);
  return [el("span", { class: "blocks", role: "img", "aria-label": words }, ...pieces), words];
}

function label(group) {
  const [, window, , kind, chunk] = group.group;
  if (kind === "chunked") return `chunk ${chunk}`;
  return kind && kind !== "sliding" && kind !== "full" ? kind : window === null ? "global" : `window ${window}`;
}

function explainedCard(one) {
  const size = Math.max(...one.groups.map((group) => group.group[2]));
  const deepest = Math.max(one.cached_tokens, 1, one.boundaries * size,
    ...one.groups.flatMap((group) => group.held.map(([, end]) => end * group.group[2])));
  const card = el("article", { class: "rank" },
    el("h3", {}, el("span", { class: "id" }, `${one.rank[0]}/${one.rank[1]}`), el("span", {}, `would reuse ${plural(one.cached_tokens, "token")}`), el("span", { class: "faint" }, `rule ${one.rule}`)));
  if (!one.scored) card.append(el("p", { class: "note" }, "This rank is not scored: its view is stale or silent."));
  if (one.failed) card.append(el("p", { class: "note" }, `Nothing is promised, because its rule has failed: ${one.failed}`));
  for (const group of one.groups) {
    const [picture, words] = strip(group, one, deepest);
    card.append(el("p", {}, `${label(group)} `, el("span", { class: "faint" }, words)), picture);
  }
  return card;
}

function showExplained(all) {
  const kinds = [["held", "held"], ["needed", "needed and held"], ["missing", "missing for more"], ["none", "not held"], ["edge", "resumes here"]];
  const legend = el("p", { class: "legend faint" }, ...kinds.flatMap(([name, text]) => [el("i", { class: name }), text]));
  const sorted = [...all].sort((one, other) => other.cached_tokens - one.cached_tokens);
  const none = el("p", { class: "note" }, "No rank of this model is known yet.");
  $("explained").replaceChildren(...(sorted.length ? [legend, ...sorted.map(explainedCard)] : [none]));
}

function question() {
  const text = $("prompt").value;
  const asked = $("model").value ? { model_name: $("model").value } : {};
  return /^[\s\d,]+$/.test(text) && /\d/.test(text) ? { ...asked, token_ids: text.split(/[\s,]+/).filter(Boolean).map(Number) } : { ...asked, prompt: text };
}

$("explain").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("ask").disabled = true;
  try {
    showExplained(await ask("explain", question()));
  } catch (error) {
    $("explained").replaceChildren(el("p", { class: "note", role: "alert" }, error.message));
  }
  $("ask").disabled = false;
});

// -- keeping up --------------------------------------------------------------------------------------

function showModels(now) {
  const names = now.models.map((model) => model.name);
  const shown = [...$("model").options].map((option) => option.value);
  if (names.join("\n") !== shown.join("\n")) {
    const chosen = $("model").value;
    $("model").replaceChildren(...names.map((name) => el("option", { value: name }, name)));
    if (names.includes(chosen)) $("model").value = chosen;
  }
}

function showStatus(kind, text, about) {
  $("status").className = `pill ${kind}`;
  $("status").textContent = text;
  $("about").textContent = about;
}

async function update() {
  try {
    const now = await ask("overview");
    $("program").textContent = now.program;
    showStatus(now.ready ? "live" : "stale", now.ready ? "ready" : "not ready", now.ready ? `version ${now.version}` : now.reason || "");
    showNumbers(now);
    showWorkers(now);
    showChoices(now);
    showModels(now);
    before = now;
  } catch (error) {
    showStatus("silent", "not answering", `${error.message}; what is below is as of ${before ? new Date(1000 * before.now).toLocaleTimeString() : "no time"}`);
  }
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value);
  update();
});

async function keepUp() {
  if (!document.hidden) await update();
  setTimeout(keepUp, EVERY_MS);
}
document.addEventListener("visibilitychange", () => document.hidden || update());
keepUp();
