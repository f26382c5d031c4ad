"use strict";
// The page. Everything that came from a device or a person is put in as text, never as markup.

const API = "/api/v1";
const SHOWN_DEVICES = 100; // more are asked for as a person wants them
const MOST_DEVICES = 1000; // in one page of the API
const SEARCH_PAUSE = 250; // ms without a key before the server is asked
const SHOWN_EVENTS = 200;
const RANKS = ["viewer", "publisher", "operator", "admin"];
const TO_ANSWER = ["watching", "activating", "canarying", "waiting", "shadowing", "trialing", "fetching", "told", "rolling_back", "pending"];
const KINDS = ["committed", "shadowed", ...TO_ANSWER, "failed", "refused", "rolled_back", "timed_out", "lost", "held", "skipped", "offline", "left", "not_reached"];
const OVER = ["completed", "superseded", "aborted"];
const STATE_LOOK = { running: "busy", waiting: "warn", paused: "warn", completed: "good", superseded: "good", aborted: "bad", created: "busy", proposed: "warn", scheduled: "warn" };
const OUTCOME_LOOK = { committed: "good", refused: "bad", rolled_back: "bad", failed: "warn", shadowed: "good" };
const BAD_EVENTS = /abort|refus|rolled_back|fail|crash|revoke|withdraw|quarantin|problem|lost/;
const GOOD_EVENTS = /commit|complet/;

const state = { me: null, status: {}, devices: [], next: null, shown: SHOWN_DEVICES, releases: [], rollouts: [], models: [], events: [], allRollouts: false };
const $ = (id) => document.getElementById(id);

// -- small tools --------------------------------------------------------------------------------------------------------------

/** An element with properties and children; strings become text. */
function h(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const words = (text) => String(text ?? "").replaceAll("_", " ");
const pill = (text, look) => h("span", { class: `pill ${look || ""}` }, words(text));
const reach = (wave) => (wave.count ? (wave.count === 1 ? "one device" : `${wave.count} devices`) : wave.permille >= 1000 ? "everyone" : [...wave.groups, ...(wave.permille ? [`${wave.permille / 10} %`] : [])].join(", "));
const may = (role) => state.me && RANKS.indexOf(state.me.role) >= RANKS.indexOf(role);
const clock = (at) => new Date(at * 1000).toLocaleTimeString([], { hour12: false });
const moment = (at) => new Date(at * 1000).toLocaleString([], { hour12: false });

function ago(at) {
  if (at === null || at === undefined) return "never";
  const seconds = Math.max(0, Math.round(Date.now() / 1000 - at));
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60]]) if (seconds >= size) return `${Math.floor(seconds / size)} ${unit} ago`;
  return seconds < 5 ? "now" : `${seconds} s ago`;
}

function bytes(number) {
  for (const unit of ["B", "KiB", "MiB"]) {
    if (number < 1024) return `${unit === "B" ? number : number.toFixed(1)} ${unit}`;
    number /= 1024;
  }
  return `${number.toFixed(1)} GiB`;
}

/** Puts `children` into the element, unless it shows just that already; keeps the focus by `data-key`. */
function show(element, ...children) {
  const fresh = h("div", null, ...children);
  if (fresh.isEqualNode(element.shadowOf)) return;
  element.shadowOf = fresh.cloneNode(true);
  const key = element.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  element.replaceChildren(...fresh.childNodes);
  if (key) element.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
}

// -- the server ---------------------------------------------------------------------------------------------------------------

async function call(method, path, body) {
  const options = { method, credentials: "same-origin", headers: { "X-Edge-Fleet": "1" } };
  if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const response = await fetch(API + path, options);
  const data = await response.json().catch(() => ({}));
  if (response.status === 401 && path !== "/session") signedOut();
  if (!response.ok) throw new Error(data.error || `the server answered ${response.status}`);
  return data;
}

const reading = {
  status: async () => { state.status = await call("GET", "/status"); },
  devices: async () => {
    const wanted = new URLSearchParams({ limit: String(state.shown) });
    if ($("filter").value.trim()) wanted.set("text", $("filter").value.trim());
    if ($("only-trouble").checked) wanted.set("trouble", "true");
    const page = await call("GET", `/devices?${wanted}`);
    [state.devices, state.next] = [page.devices, page.next];
  },
  releases: async () => { state.releases = await call("GET", "/releases"); },
  rollouts: async () => {
    [state.rollouts, state.models] = await Promise.all([call("GET", "/rollouts?limit=30"), call("GET", "/models")]);
  },
};
const waiting = new Set();
let scheduled = null;
let pace = 120; // ms until the next reading; longer where reading takes long, so that a large fleet does not read without end

/** Reads the named parts again soon; what changes in quick succession is read once. */
function refresh(...parts) {
  parts.forEach((part) => waiting.add(part));
  scheduled ??= setTimeout(async () => {
    const now = [...waiting];
    waiting.clear();
    const began = performance.now();
    try {
      await Promise.all(now.map((part) => reading[part]()));
      problem("");
    } catch (error) {
      problem(error.message);
    }
    scheduled = null;
    render();
    pace = Math.min(5000, Math.max(120, 4 * (performance.now() - began)));
    if (waiting.size) refresh();
  }, pace);
}

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

let source = null;

function follow() {
  source?.close();
  const last = state.events.length ? `?after=${state.events[0].seq}` : "";
  source = new EventSource(`${API}/events/stream${last}`);
  source.onopen = () => { live(true); refresh("status", "devices", "rollouts", "releases"); };
  source.onerror = () => {
    live(false);
    if (source.readyState === EventSource.CLOSED) setTimeout(() => { if (state.me) call("GET", "/me").then(follow, () => setTimeout(follow, 3000)); }, 1500);
  };
  source.addEventListener("event", (message) => addEvents([JSON.parse(message.data)]));
  source.addEventListener("change", (message) => {
    const what = JSON.parse(message.data).what;
    refresh(...(what === "devices" ? ["devices", "status"] : what === "releases" ? ["releases", "rollouts"] : ["rollouts", "devices"]));
  });
}

function live(on) {
  $("live").textContent = on ? "live" : "reconnecting";
  $("live").classList.toggle("on", on);
}

// -- in and out ---------------------------------------------------------------------------------------------------------------

async function start() {
  try {
    state.me = await call("GET", "/me");
  } catch {
    return signedOut();
  }
  $("sign-in").hidden = true;
  $("app").hidden = $("top").hidden = false;
  $("who").textContent = `${state.me.name} (${state.me.role})`;
  state.events = [];
  addEvents(await call("GET", `/events?limit=${SHOWN_EVENTS}`));
  follow();
}

function signedOut() {
  state.me = null;
  source?.close();
  $("app").hidden = $("top").hidden = true;
  if ($("sign-in").hidden) {
    $("sign-in").hidden = false;
    $("token").focus();
  }
}

$("sign-in-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await call("POST", "/session", { token: $("token").value.trim() });
    $("token").value = $("sign-in-error").textContent = "";
    await start();
  } catch (error) {
    $("sign-in-error").textContent = error.message;
  }
});
$("sign-out").addEventListener("click", async () => { await call("DELETE", "/session").catch(() => {}); signedOut(); });

// -- what is shown ------------------------------------------------------------------------------------------------------------

function render() {
  if (!state.me) return;
  const name = state.status.fleet || "Fleet";
  $("fleet-name").textContent = name;
  document.title = `${name} fleet`;
  show($("warnings"), (state.status.warnings || []).map((warning) => h("p", { class: "error banner" }, warning)));
  renderTiles();
  renderRollouts();
  renderDevices();
  renderReleases();
}

const counted = () => state.status.devices || { online: 0, total: 0, trouble: 0 };

function lastAnswer(model) {
  return [...(model.answers || [])].sort((a, b) => b.at - a.at)[0] || null;
}

function renderTiles() {
  const bad = counted().trouble;
  const active = state.rollouts.filter((rollout) => !OVER.includes(rollout.state)).length;
  const tile = (number, of, text, look) => h("li", { class: `tile ${look || ""}` }, h("b", null, String(number), of ? h("small", null, ` of ${of}`) : null), h("span", { class: "muted" }, text));
  show($("tiles"),
    tile(counted().online, counted().total, "devices online"),
    tile(bad, null, bad === 1 ? "device in trouble" : "devices in trouble", bad ? "bad" : ""),
    tile(active, null, active === 1 ? "rollout under way" : "rollouts under way"),
    state.models.map((model) => tile(model.release === null ? "none" : `v${model.release}`, null, `${model.model} everywhere`)));
}

function renderRollouts() {
  const active = state.rollouts.filter((rollout) => !OVER.includes(rollout.state));
  const over = state.rollouts.filter((rollout) => OVER.includes(rollout.state));
  const shown = [...active, ...(state.allRollouts ? over : over.slice(0, active.length ? 1 : 2))];
  if (!shown.length) return show($("rollout-list"), h("p", { class: "card empty" }, "No rollout yet. Start one at a release below, or with ", h("code", null, "edge-fleet rollout start"), "."));
  const hiddenCount = state.rollouts.length - shown.length;
  show($("rollout-list"), shown.map(rolloutCard),
    hiddenCount > 0 ? h("p", null, h("button", { class: "small", "data-key": "older", onclick: () => { state.allRollouts = true; render(); } }, `Show ${hiddenCount} earlier`)) : null);
}

function rolloutCard(rollout) {
  const title = `${rollout.model}:${rollout.release}`;
  const before = rollout.previous === null ? "first release" : `after ${rollout.model}:${rollout.previous}`;
  return h("article", { class: "card", "aria-label": `Rollout of ${title}` },
    h("div", { class: "rollout-head" }, h("h3", null, title), pill(rollout.state === "waiting" ? "waits for confirmation" : rollout.state, STATE_LOOK[rollout.state]),
      h("span", { class: "muted small" }, `${before} · ${rollout.id} · by ${rollout.created_by} · ${ago(rollout.created)}`), rolloutActions(rollout)),
    rollout.team.length ? h("p", { class: "muted small" }, `In a team with ${rollout.team.map((one) => `${one.model}:${one.release}`).join(", ")}: all of them on a device, or none.`) : null,
    rollout.waits_for ? h("p", { class: "muted small" }, `Waits: ${rollout.waits_for}`) : null,
    rollout.mode === "shadow" ? h("p", { class: "muted small" }, "Only tried on copies of live requests: nothing is installed.") : null,
    rollout.window ? h("p", { class: "muted small" }, `Devices switch in ${rollout.window}, their local time.`) : null,
    h("ol", { class: "waves" }, rollout.waves.map((wave, number) => waveStep(rollout, wave, number))),
    rollout.exclusions.map((one) => exclusion(one)),
    rollout.verdict ? verdictView(rollout) : null);
}

function exclusion(one) {
  const ended = one.ended !== null;
  const end = !ended && may("operator") ? h("button", { class: "small", "data-key": `end-${one.id}`, onclick: () => confirmThen("End the exclusion", `Let ${one.hardware} have ${one.model}:${one.release} after all? It is not excluded again.`, () => call("POST", `/exclusions/${one.id}/end`, {})) }, "End") : null;
  return h("p", { class: ended ? "why muted" : "why error" }, `${ended ? `${one.hardware} was excluded (ended by ${one.ended_by})` : `${one.hardware} is excluded`}: ${one.reason} `, end);
}

function waveStep(rollout, wave, number) {
  const completed = rollout.state === "completed";
  const look = number < rollout.wave || completed ? "done" : number === rollout.wave ? (rollout.state === "aborted" ? "stopped" : "now") : "later";
  const said = { done: "passed", now: rollout.state === "waiting" ? "passed, waits for confirmation" : rollout.state, stopped: "stopped here", later: "not yet" }[look];
  return h("li", { class: `wave ${look}`, "aria-current": look === "now" ? "step" : null }, h("b", null, `Wave ${number + 1}: ${reach(wave)}`), h("br"), said);
}

function verdictView(rollout) {
  const { counts, why, evidence } = rollout.verdict;
  const look = (kind) => `c-${TO_ANSWER.includes(kind) ? "to_answer" : kind}`;
  const present = KINDS.filter((kind) => counts[kind]);
  const bad = evidence.filter((witness) => ["refused", "rolled_back", "lost", "timed_out", "failed"].includes(witness.standing)).slice(0, 8);
  const bar = h("div", { class: "meter", role: "img", "aria-label": present.map((kind) => `${counts[kind]} ${words(kind)}`).join(", ") || "no device yet" },
    present.filter((kind) => kind !== "left").map((kind) => { const part = h("span", { class: look(kind) }); part.style.flexGrow = counts[kind]; return part; }));
  return h("div", null, bar,
    h("ul", { class: "legend" }, present.map((kind) => h("li", null, h("i", { class: look(kind) }), h("button", { class: "link", "data-key": `${rollout.id}-${kind}`, title: "Which devices?", onclick: () => standingDialog(rollout, kind) }, `${counts[kind]} ${words(kind)}`)))),
    h("p", { class: `why ${rollout.state === "aborted" ? "error" : "muted"}` }, rollout.state === "aborted" && rollout.reason ? `Aborted: ${rollout.reason}` : why),
    bad.length ? h("ul", { class: "witnesses" }, bad.map(witnessLine)) : null);
}

function witnessLine(witness) {
  const bad = ["refused", "rolled_back", "failed"].includes(witness.standing);
  return h("li", null, h("b", null, witness.device), ` ${words(witness.standing)}`, bad ? [": ", h("code", null, witness.reason || "no reason")] : null, ` ${witness.message}`);
}

function rolloutActions(rollout) {
  if (!may("operator") || OVER.includes(rollout.state)) return null;
  const button = (verb, text, look, question) => h("button", { class: `small ${look}`, "data-key": `${rollout.id}-${verb}`, onclick: () => confirmThen(text, question, () => call("POST", `/rollouts/${encodeURIComponent(rollout.id)}/${verb}`, {})) }, text);
  const next = rollout.waves[rollout.wave + 1];
  return h("div", { class: "actions" },
    rollout.state === "proposed" ? button("approve", "Approve", "primary", "Let the rollout begin?") : null,
    rollout.state === "waiting" && next ? button("promote", "Promote", "primary", `Go on to ${reach(next)}?`) : null,
    ["running", "waiting"].includes(rollout.state) ? button("pause", "Pause", "", "Begin no further wave? Devices already reached go on.") : null,
    rollout.state === "paused" ? button("resume", "Resume", "primary", "Let the rollout go on?") : null,
    button("abort", "Abort", "danger", rollout.mode === "shadow" ? "Abort? Devices no longer try it; what serves is not touched." : rollout.previous === null ? "Abort? Devices stop serving the model: there is no release before." : `Abort? Every device goes back to ${rollout.model}:${rollout.previous}.`));
}

function renderDevices() {
  const searched = $("filter").value.trim() || $("only-trouble").checked;
  if (!state.devices.length && searched) return show($("device-list"), h("p", { class: "empty" }, "No device matches."));
  if (!state.devices.length) return show($("device-list"), h("p", { class: "empty" }, "No device yet. Make an enrolment string: ", h("code", null, "edge-fleet token create"), "."));
  const more = state.shown < MOST_DEVICES
    ? h("button", { class: "small", "data-key": "more", onclick: () => { state.shown = Math.min(MOST_DEVICES, 2 * state.shown); refresh("devices"); } }, "Show more")
    : "Search for others, or list all with edge-fleet device list.";
  show($("device-list"),
    table("Devices", ["Device", "State", "Groups", "Runs", "Last answer", "Seen"], state.devices.map(deviceRow)),
    state.next === null ? null : h("p", { class: "more muted" }, `The first ${state.devices.length}${searched ? " that match" : ` of ${counted().total}`}. `, more));
}

function table(caption, headings, rows) {
  return h("table", null, h("caption", { class: "hidden" }, caption), h("thead", null, h("tr", null, headings.map((heading) => h("th", { scope: "col" }, heading)))), h("tbody", null, rows));
}

const cell = (label, properties, ...children) => h("td", { "data-label": label, ...properties }, ...children);

function deviceRow(device) {
  const models = Object.entries(device.models);
  const standing = device.revoked ? pill("revoked", "bad") : device.online ? pill("online", "good") : pill("offline");
  return h("tr", null,
    cell("", null, h("button", { class: "link", "data-key": `device-${device.id}`, onclick: () => deviceDialog(device.id) }, device.id)),
    cell("", null, standing, device.problem ? h("div", { class: "error small" }, device.problem) : null),
    cell("Groups", null, device.groups.map((group) => h("span", { class: "tag" }, group))),
    cell("Runs", null, models.length ? models.map(([name, model]) => modelView(name, model)) : h("span", { class: "muted" }, "nothing reported")),
    cell("Last answer", { class: "answer" }, models.map(([, model]) => answerView(lastAnswer(model)))),
    cell("Seen", { class: "num" }, ago(device.last_seen)));
}

function modelView(name, model) {
  const busy = model.phase !== "steady";
  const target = busy && model.target && model.target !== model.serving ? ` → ${model.target}` : "";
  return h("div", { class: "model" }, h("b", null, model.serving === null ? `${name}: nothing` : `${name}:${model.serving}`), target, " ",
    model.variant ? h("span", { class: "tag" }, model.variant) : null,
    busy ? pill(model.phase, ["rolling_back", "quarantined"].includes(model.phase) ? "bad" : "busy") : null, " ",
    busy && model.progress !== null && model.progress !== undefined ? h("progress", { max: 1, value: model.progress, "aria-label": `${name} ${Math.round(model.progress * 100)} %` }) : null,
    model.stage ? h("span", { class: "muted small" }, stageText(model.stage)) : null,
    model.held ? pill("held", "warn") : null);
}

function stageText(stage) {
  const found = stage.evidence || {};
  if (stage.verdict === "skipped") return stage.message;
  if (stage.name === "canary") return `${found.requests ?? 0} requests, ${found.failed ?? 0} failed; beside it ${found.beside_requests ?? 0}, ${found.beside_failed ?? 0} failed`;
  const ratio = found.latency_ratio ? `, ${found.latency_ratio} times as long` : "";
  return `${found.samples ?? 0} copies, ${Math.round((found.agreement ?? 1) * 1000) / 10} % agree${ratio}${found.errors ? `, ${found.errors} failed` : ""}`;
}

function answerView(answer) {
  if (!answer) return h("div", { class: "muted" }, "none");
  return h("div", { class: "model" }, pill(`${answer.outcome} ${answer.release}`, OUTCOME_LOOK[answer.outcome]), " ",
    answer.reason ? h("code", null, answer.reason) : null, answer.message ? h("span", { class: "muted small" }, ` ${answer.message}`) : null);
}

function renderReleases() {
  if (!state.releases.length) return show($("release-list"), h("p", { class: "empty" }, "No release yet. Publish one: ", h("code", null, "edge-fleet publish RELEASE.yaml --key releases.key"), "."));
  show($("release-list"), table("Releases", ["Release", "State", "Variants", "Size", "Published", "From", ""], state.releases.map(releaseRow)));
}

function releaseRow(release) {
  const everywhere = state.models.some((model) => model.model === release.model && model.release === release.version);
  const moving = state.rollouts.some((rollout) => !OVER.includes(rollout.state) && rollout.model === release.model && rollout.release === release.version);
  const standing = release.deleted ? pill("deleted", "bad") : release.withdrawn ? pill("withdrawn", "bad") : everywhere ? pill("everywhere", "good") : moving ? pill("rolling out", "busy") : pill("published");
  const { notes, publisher } = release.provenance;
  return h("tr", null,
    cell("", null, h("b", null, release.release)),
    cell("", null, standing),
    cell("Variants", null, release.variants.map((variant) => h("span", { class: "tag" }, `${variant.name} · ${variant.runtime}`))),
    cell("Size", { class: "num" }, bytes(release.size_bytes)),
    cell("Published", { class: "num" }, h("time", { title: moment(release.published) }, ago(release.published))),
    cell("From", { class: "answer small" }, publisher || "", h("span", { class: "muted" }, ` key ${(release.signers[0] || "").slice(0, 8)} · ${release.golden_cases} golden`), notes ? h("div", { class: "muted" }, notes) : null),
    cell("", { class: "num" }, may("operator") && !release.withdrawn ? [
      everywhere || moving || release.deleted ? null : h("button", { class: "small", "data-key": `roll-${release.release}`, onclick: () => startDialog(release) }, "Roll out…"), " ",
      h("button", { class: "small quiet", "data-key": `withdraw-${release.release}`, onclick: () => confirmThen("Withdraw", `Withdraw ${release.release} for good? No device may run it any more.`, () => call("POST", `/releases/${encodeURIComponent(release.model)}/${release.version}/withdraw`, {})) }, "Withdraw"),
    ] : null));
}

function addEvents(found) {
  const known = new Set(state.events.map((event) => event.seq));
  const fresh = found.filter((event) => !known.has(event.seq));
  state.events = [...fresh].reverse().concat(state.events).slice(0, SHOWN_EVENTS);
  for (const event of fresh) $("event-list").prepend(eventLine(event));
  while ($("event-list").children.length > SHOWN_EVENTS) $("event-list").lastChild.remove();
}

function eventLine(event) {
  const look = BAD_EVENTS.test(event.name) ? "bad" : GOOD_EVENTS.test(event.name) ? "good" : "";
  return h("li", null, h("time", { class: "muted", title: moment(event.received) }, clock(event.received)), h("b", null, event.device || "server"),
    h("span", { class: look }, words(event.name)), h("span", null, event.message, event.reason ? h("code", null, ` ${event.reason}`) : null));
}

// -- dialogs ------------------------------------------------------------------------------------------------------------------

let onOk = null;

function openDialog(title, body, okText, action) {
  $("dialog-title").textContent = title;
  $("dialog-body").replaceChildren(...body);
  $("dialog-error").textContent = "";
  $("dialog-ok").hidden = !okText;
  $("dialog-ok").textContent = okText || "";
  $("dialog-cancel").textContent = okText ? "Cancel" : "Close";
  onOk = action;
  $("dialog").showModal();
}

$("dialog-cancel").addEventListener("click", () => $("dialog").close());
$("dialog-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("dialog-ok").disabled = true;
  try {
    if (onOk) await onOk();
    $("dialog").close();
    refresh("rollouts", "devices", "releases");
  } catch (error) {
    $("dialog-error").textContent = error.message;
  }
  $("dialog-ok").disabled = false;
});

const confirmThen = (title, question, action) => openDialog(title, [h("p", null, question)], title, action);

function startDialog(release) {
  const groups = h("input", { id: "start-groups", placeholder: "canary, warsaw", spellcheck: "false" });
  const percent = h("input", { id: "start-percent", type: "number", min: "0.1", max: "100", step: "0.1" });
  const failures = h("input", { id: "start-failures", type: "number", min: "0", placeholder: "any number that is no accident" });
  const confirm = h("input", { id: "start-confirm", type: "checkbox" });
  const shadow = h("input", { id: "start-shadow", type: "checkbox" });
  openDialog(`Roll out ${release.release}`, [
    h("p", { class: "muted" }, "The first wave is what you name here, then everyone. A wave tells a few devices first, and the rest as they answer. A rollout that too many devices refuse is stopped."),
    h("label", { for: "start-groups" }, "First wave: groups"), groups,
    h("label", { for: "start-percent" }, "First wave: percent of the devices"), percent,
    h("label", { for: "start-failures" }, "At most so many devices may refuse it or roll back"), failures,
    h("label", { class: "check" }, confirm, "confirm each further wave"),
    h("label", { class: "check" }, shadow, "only try it: run it on copies of live requests, install nothing"),
  ], "Start", () => call("POST", "/rollouts", {
    release: release.release, groups: groups.value.split(/[\s,]+/).filter(Boolean), percent: percent.value ? Number(percent.value) : null,
    confirm: confirm.checked, mode: shadow.checked ? "shadow" : "install", max_failures: failures.value === "" ? null : Number(failures.value),
  }));
}

/** The devices that stand like that to a rollout's release, by what they say now; more of them as they are asked for. */
async function standingDialog(rollout, kind) {
  const list = h("ul", { class: "witnesses" });
  const more = h("button", { class: "small", type: "button", "data-key": "more-devices" }, "Show more");
  let after = "";
  const show = async () => {
    let page;
    do {
      page = await call("GET", `/rollouts/${encodeURIComponent(rollout.id)}/devices?${new URLSearchParams({ standing: kind, limit: "50", after })}`);
      after = page.next;
    } while (!page.devices.length && after !== null);
    list.append(...page.devices.map(witnessLine));
    if (!list.children.length) list.append(h("li", { class: "muted" }, "No device stands like that now."));
    more.hidden = after === null;
  };
  more.addEventListener("click", () => show().catch((error) => { $("dialog-error").textContent = error.message; }));
  await show();
  openDialog(`${rollout.model}:${rollout.release} ${words(kind)}`, [list, more], "", null);
}

async function deviceDialog(id) {
  const device = await call("GET", `/devices/${encodeURIComponent(id)}`);
  const hardware = device.hardware || {};
  const line = (name, ...value) => [h("dt", null, name), h("dd", null, ...value)];
  const groups = h("input", { id: "device-groups", value: device.groups.join(", "), spellcheck: "false" });
  const models = Object.entries(device.models).map(([name, model]) => h("div", null,
    h("h3", null, `${name}:${model.serving ?? "nothing"}`), h("dl", null,
      line("phase", pill(model.stopped ? "stopped" : model.waiting_for ? `waiting for ${model.waiting_for}` : model.phase, model.stopped ? "bad" : model.phase === "steady" ? "good" : "busy")), model.stopped ? line("stopped", model.stopped) : null, line("wanted", String(model.wanted ?? "nothing")), line("variant", `${model.variant || "none"} on ${model.placement || "unknown"}`),
      model.stage ? line(model.stage.name, `${model.stage.release} ${model.stage.verdict}: ${stageText(model.stage)}`) : [],
      line("requests", `${model.requests}, ${model.failures} failed${model.p95_ms ? `, p95 ${model.p95_ms.toFixed(2)} ms` : ""}`),
      line("answers", ...model.answers.map((answer) => h("div", null, answerView(answer), h("span", { class: "muted small" }, moment(answer.at))))))));
  openDialog(device.id, [
    h("dl", null, line("state", device.revoked ? "revoked" : device.online ? "online" : "offline", `, seen ${ago(device.last_seen)}`), line("hardware", `${hardware.arch || "unknown"} ${hardware.machine || ""}`, hardware.cpus ? `, ${hardware.cpus} CPUs, ${bytes(hardware.memory_bytes)}` : ""),
      line("agent", device.agent_version || "unknown"), line("assignment", String(device.assignment_version ?? "none")), line("record", `serial ${device.record_serial}`),
      device.problem ? line("problem", h("span", { class: "error" }, device.problem)) : []),
    ...models, may("operator") ? h("label", { for: "device-groups" }, "Groups") : "", may("operator") ? groups : "",
  ], may("operator") ? "Save groups" : "", () => call("PUT", `/devices/${encodeURIComponent(id)}/groups`, { groups: groups.value.split(/[\s,]+/).filter(Boolean) }));
}

// -- begin --------------------------------------------------------------------------------------------------------------------

let typed = null;
function search() {
  clearTimeout(typed);
  state.shown = SHOWN_DEVICES;
  typed = setTimeout(() => refresh("devices"), SEARCH_PAUSE);
}
$("filter").addEventListener("input", search);
$("only-trouble").addEventListener("change", search);
setInterval(() => { if (state.me && !document.hidden) refresh("status", "devices", "rollouts"); }, 15000);
start();
