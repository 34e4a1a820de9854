/** The playground: reads the form, asks the API, shows what comes back. */

import { Api, Problem } from "./api.js";
import { framesAt, freshCopy, isGif, kindOf } from "./media.js";
import { overlay } from "./overlay.js";

const DEMO = "prism-demo";
const BUDGETS = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 576, 768, 1024, 1536, 2048, 2880, 4096];
const COMPARED = [32, 64, 128, "all"];
const SUGGESTED = ["What color is the star?", "How many shapes are there?", "What shape is yellow?", "What is left of the star?"];
const STAGES = [
  ["queue_ms", "Queue"], ["decode_ms", "Decode"], ["preprocess_ms", "Preprocess"], ["vision_ms", "Vision"],
  ["select_ms", "Select"], ["prefill_ms", "Prefill"], ["generate_ms", "Generate"],
];
const KINDS = ["salient", "diverse", "kept"];
const LOOK_AGAIN_MS = 3000;

const api = new Api();
const $ = (id) => document.getElementById(id);
/** The chosen media: the file, its URL in this page, its kind, and its id once the service has it. */
let media = null;
let models = [];
let asking = null;
let looking = 0;

// --- The service

async function look() {
  clearTimeout(looking);
  try {
    models = await api.models();
    tell(null);
    $("key-field").hidden = !api.key;
  } catch (error) {
    models = [];
    if (error.status === 401) return askForKey(error);
    status("away", error.title);
    looking = setTimeout(look, LOOK_AGAIN_MS);
    return;
  }
  const select = $("model");
  const chosen = select.value;
  select.replaceChildren(...models.map((model) => make("option", { value: model.id }, model.id)));
  if (models.some((model) => model.id === chosen)) select.value = chosen;
  $("model-field").hidden = models.length < 2;
  showModel();
}

function askForKey(error) {
  status("away", "Asks for an API key");
  $("key-field").hidden = false;
  if (api.key) tell(error);
  else $("key").focus();
}

function model() {
  return models.find((each) => each.id === $("model").value);
}

function showModel() {
  const here = model();
  const warm = Boolean(here?.workers);
  if (warm) status("ready", here.id);
  else status("waiting", here ? `${here.id} is warming up …` : "No model is there yet …");
  if (!warm) looking = setTimeout(look, LOOK_AGAIN_MS);
  $("demo-note").hidden = here?.id !== DEMO;
  const chosen = $("method").value;
  $("method").replaceChildren(...(here?.methods ?? ["prism"]).map((name) => make("option", {}, name)));
  if (here?.methods.includes(chosen)) $("method").value = chosen;
  suggest();
}

function status(state, text) {
  $("service").dataset.state = state;
  $("service").textContent = text;
}

// --- Media

function choose(file, example = false) {
  if (!file) return;
  if (media) URL.revokeObjectURL(media.url);
  media = { file, example, url: URL.createObjectURL(file), kind: kindOf(file), id: null };
  $("frames-field").hidden = media.kind !== "video";
  showMedia();
  suggest();
  showCurl();
}

function showMedia() {
  $("legend").hidden = true;
  $("result").hidden = true;
  $("comparison").hidden = true;
  $("stage").classList.remove("empty");
  $("stage").replaceChildren(shot(media.kind === "video" && !isGif(media.file) ? clip() : picture()));
}

function picture() {
  const image = make("img", { alt: media.example ? "Example scene: a red star, an orange rectangle, a green diamond, a yellow heart" : "Your picture" });
  image.addEventListener("error", () => tell(new Problem("Not a picture", "This browser cannot show the file; the service may still take it.")));
  image.src = media.url;
  return image;
}

function clip() {
  const video = make("video", { controls: true, muted: true, src: media.url });
  video.setAttribute("aria-label", "Your clip");
  return video;
}

function shot(...content) {
  return make("div", { className: "shot" }, ...content.filter(Boolean));
}

async function example() {
  const response = await fetch("playground/scene.jpg");
  choose(new File([await response.blob()], "scene.jpg", { type: "image/jpeg" }), true);
}

function suggest() {
  $("suggestions").hidden = !(media?.example && model()?.id === DEMO);
}

// --- The budget

function budget() {
  return $("all").checked ? "all" : $("budget").valueAsNumber;
}

function slide() {
  const nearest = BUDGETS.findIndex((each) => each >= $("budget").valueAsNumber);
  $("slider").value = nearest < 0 ? BUDGETS.length - 1 : nearest;
  tellSlider();
}

function tellSlider() {
  $("slider").setAttribute("aria-valuetext", `${$("budget").value} tokens`);
}

function showBudget() {
  for (const id of ["slider", "budget"]) $(id).disabled = $("all").checked;
}

// --- Asking

/** The body of a request, but for its media. */
function asked(tokens) {
  const clipped = media.kind === "video" && { sampling: { num_frames: $("frames").valueAsNumber } };
  const method = $("method").value;
  return { model: $("model").value || undefined, question: $("question").value, token_budget: tokens, method, ...clipped };
}

async function ask(signal) {
  if (!media) throw new Problem("No picture yet", "Choose a picture or a clip, or take the example scene.");
  const here = media;
  $("comparison").hidden = true;
  $("result").hidden = false;
  $("figures").replaceChildren();
  const answer = $("answer");
  answer.textContent = "";
  answer.classList.add("coming");
  if (!matchMedia("(min-width: 56rem)").matches) $("result").scrollIntoView({ block: "nearest" });
  try {
    const question = { ...asked(budget()), include: ["token_map"] };
    const result = await askAbout(here, question, (text) => (answer.textContent = text), signal);
    answer.textContent = result.answer || "(no text)";
    $("figures").replaceChildren(...figures(result));
    $("told").textContent = `${result.answer}. ${result.visual_tokens.kept} of ${result.visual_tokens.original} visual tokens kept.`;
    await showKept(here, result);
  } catch (error) {
    $("result").hidden = !answer.textContent;
    throw error;
  } finally {
    answer.classList.remove("coming");
  }
}

/** Uploads once, and asks by id; once more where the service has forgotten the file since. */
async function askAbout(here, question, onText, signal) {
  const known = here.id !== null;
  here.id ??= await api.upload(here.file, signal);
  try {
    return await api.ask({ ...question, [here.kind]: { id: here.id } }, onText, signal);
  } catch (error) {
    if (!known || error.status !== 404) throw error;
    here.id = null;
    return askAbout(here, question, onText, signal);
  }
}

async function compare(signal) {
  if (!media) throw new Problem("No picture yet", "Choose a picture or a clip, or take the example scene.");
  const here = media;
  $("result").hidden = true;
  $("comparison").hidden = false;
  const cards = COMPARED.map((tokens) => budgetCard(here, tokens));
  $("budgets").replaceChildren(...cards.map((card) => card.item));
  $("comparison").scrollIntoView({ block: "nearest" });
  const results = [];
  try {
    for (const card of cards) {
      card.answer.classList.add("coming");
      const copy = { ...here, file: await freshCopy(here.file), id: null };
      const question = { ...asked(card.tokens), include: ["token_map"] };
      const result = await askAbout(copy, question, (text) => (card.answer.textContent = text), signal);
      card.answer.classList.remove("coming");
      card.answer.textContent = result.answer || "(no text)";
      results.push({ card, result });
      showCompared(here, results);
    }
    $("told").textContent = "All budgets are answered.";
  } finally {
    for (const card of cards) card.answer.classList.remove("coming");
  }
}

function budgetCard(here, tokens) {
  const answer = make("p", { className: "answer" });
  const frame = here.kind === "image" ? shot(make("img", { src: here.url, alt: "" })) : null;
  const facts = make("div");
  const title = make("h3", {}, tokens === "all" ? "All tokens" : `${tokens} tokens`);
  const item = make("li", {}, title, ...[frame, answer, facts].filter(Boolean));
  return { tokens, item, answer, frame, facts };
}

/** Bars are shares of the longest time so far, so that the cards can be read across. */
function showCompared(here, results) {
  const longest = Math.max(...results.map(({ result }) => longestOf(result.timings)));
  const whole = results.find(({ card }) => card.tokens === "all")?.result;
  for (const { card, result } of results) {
    const { timings, memory } = result;
    const rows = [["First token", timings.time_to_first_token_ms], ["Total", timings.total_ms]];
    card.facts.replaceChildren(
      make("p", { className: "small" }, keptOf(result)),
      bars("", rows, longest),
      make("p", { className: "small quiet" }, `${bytes(memory.kv_cache_bytes)} of keys and values`),
      ...warnings(result),
    );
    if (whole && whole !== result) {
      const times = whole.timings.time_to_first_token_ms / timings.time_to_first_token_ms;
      card.facts.append(make("p", { className: times > 1 ? "sooner" : "small" }, `First token ${times.toFixed(1)}× as fast as with all`));
    }
  }
  const { card, result } = results.at(-1);
  if (card.frame) lay(card.frame, result.token_map);
}

function longestOf(timings) {
  return Math.max(timings.time_to_first_token_ms, timings.total_ms);
}

/** Runs `work` alone, with a way to stop it; shows what goes wrong. */
async function busy(work) {
  if (asking || !$("ask").reportValidity()) return;
  asking = new AbortController();
  tell(null);
  $("told").textContent = "Asking …";
  for (const id of ["send", "compare"]) $(id).disabled = true;
  $("stop").hidden = false;
  try {
    await work(asking.signal);
  } catch (error) {
    if (error.name === "AbortError") $("told").textContent = "Stopped.";
    else if (error.status === 401) askForKey(error);
    else tell(error);
  } finally {
    asking = null;
    for (const id of ["send", "compare"]) $(id).disabled = false;
    $("stop").hidden = true;
  }
}

function tell(error) {
  $("problem").hidden = !error;
  if (!error) return;
  if (!(error instanceof Problem)) console.error(error);
  $("told").textContent = "";
  $("problem").replaceChildren(
    make("p", {}, make("strong", {}, error.title ?? "This page has a fault")),
    make("p", {}, error.detail ?? error.message),
  );
}

// --- Showing

function figures(result) {
  const { visual_tokens: tokens, timings, memory, usage } = result;
  const cached = usage.prompt_tokens_details.cached_tokens;
  const shared = memory.shared_with ? `, shared with ${memory.shared_with} more` : "";
  const tiles = [
    ["First token", time(timings.time_to_first_token_ms)], ["Total", time(timings.total_ms)],
    ["Keys and values", bytes(memory.kv_cache_bytes)], [`Peak memory, ${memory.device}${shared}`, bytes(memory.peak_bytes)],
  ];
  const known = cached && make("p", { className: "small quiet" }, `${cached} tokens of the prompt were encoded for an earlier question.`);
  const stages = STAGES.map(([name, label]) => [label, timings[name]]);
  return [
    share(tokens),
    make("p", {}, make("strong", {}, keptOf(result)), ` · ${tokens.method === "none" ? "nothing pruned" : tokens.method}`),
    make("dl", { className: "tiles" }, ...tiles.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)))),
    bars("Where the time went", stages, Math.max(...stages.map(([, ms]) => ms))),
    ...[known].filter(Boolean),
    ...warnings(result),
  ];
}

function keptOf({ visual_tokens: tokens }) {
  const parts = tokens.salient === null ? "" : `: ${tokens.salient} salient, ${tokens.diverse} diverse`;
  return `Kept ${tokens.kept} of ${tokens.original} visual tokens${parts}`;
}

function share(tokens) {
  const parts = tokens.salient === null ? { kept: tokens.kept } : { salient: tokens.salient, diverse: tokens.diverse };
  const bar = make("div", { className: "share" });
  bar.setAttribute("aria-hidden", "true");
  for (const [kind, count] of Object.entries(parts)) {
    const piece = make("i", { className: kind });
    piece.style.width = `${(100 * count) / tokens.original}%`;
    bar.append(piece);
  }
  return bar;
}

function bars(title, rows, longest) {
  const lines = rows.map(([name, ms]) => {
    const bar = make("span", { className: "bar" });
    bar.style.width = `${(100 * ms) / longest}%`;
    const head = make("th", { scope: "row" }, name);
    return make("tr", {}, head, make("td", {}, bar), make("td", {}, time(ms)));
  });
  return make("table", {}, ...(title ? [make("caption", {}, title)] : []), make("tbody", {}, ...lines));
}

function warnings(result) {
  if (!result.warnings.length) return [];
  return [make("ul", { className: "warnings" }, ...result.warnings.map((each) => make("li", {}, each)))];
}

async function showKept(here, result) {
  const map = result.token_map;
  showLegend(result);
  if (here.kind === "image") {
    if (media === here) lay($("stage").querySelector(".shot"), map);
    return;
  }
  const numbers = [...new Set(map.map((part) => part.frame))];
  const parts = numbers.map((number) => map.filter((part) => part.frame === number));
  const frames = await framesAt(here.file, here.url, parts.map(([first]) => first.time_s ?? 0));
  if (media !== here) return; // another one was chosen meanwhile
  const strip = parts.map((each, index) => {
    const frame = shot(frames[index] ?? make("div", { className: "undecoded" }));
    lay(frame, each);
    const count = each.reduce((sum, part) => sum + KINDS.reduce((n, kind) => n + (part[kind]?.length ?? 0), 0), 0);
    return make("figure", {}, frame, make("figcaption", {}, `${(each[0].time_s ?? 0).toFixed(2)} s · ${count} kept`));
  });
  const player = isGif(here.file) ? picture() : clip();
  $("stage").replaceChildren(shot(player), make("div", { className: "frames" }, ...strip));
}

function lay(frame, map) {
  frame.querySelector(".overlay")?.remove();
  const right = Math.max(...map.map((part) => part.box[2]));
  const bottom = Math.max(...map.map((part) => part.box[3]));
  const image = frame.querySelector("img");
  const drawn = overlay(map, image?.naturalWidth || right, image?.naturalHeight || bottom);
  if (drawn) frame.append(drawn);
}

function showLegend({ visual_tokens: tokens }) {
  const entries = tokens.salient === null ? [["kept", tokens.kept]] : [["salient", tokens.salient], ["diverse", tokens.diverse]];
  entries.push(["dropped", tokens.original - tokens.kept]);
  $("legend").replaceChildren(
    ...entries.map(([kind, count]) => make("li", {}, make("span", { className: `swatch ${kind}` }), `${count} ${kind}`)),
  );
  $("legend").hidden = false;
}

function showCurl() {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const file = media ? `${media.kind}=@${media.example ? "examples/scene.png" : media.file.name}` : "image=@picture.png";
  const fields = [file, `question=${$("question").value}`, `token_budget=${budget()}`, `method=${$("method").value}`];
  if (media?.kind === "video") fields.push(`sampling={"num_frames": ${$("frames").value}}`);
  const key = api.key || !$("key-field").hidden ? ' -H "Authorization: Bearer $KEY"' : "";
  const url = new URL("v1/answer", document.baseURI);
  $("curl").textContent = [`curl -s ${url}${key}`, ...fields.map((field) => `  -F ${quoted(field)}`)].join(" \\\n");
}

function time(ms) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`;
  return `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
}

function bytes(count) {
  const units = ["B", "kB", "MB", "GB"];
  const step = Math.min(Math.floor(Math.log10(Math.max(1, count)) / 3), 3);
  return `${(count / 1000 ** step).toFixed(step ? 1 : 0)} ${units[step]}`;
}

function make(name, properties = {}, ...content) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...content);
  return made;
}

// --- What the visitor does

$("slider").max = BUDGETS.length - 1;
$("slider").addEventListener("input", () => {
  $("budget").value = BUDGETS[$("slider").value];
  tellSlider();
});
$("budget").addEventListener("input", slide);
$("all").addEventListener("change", showBudget);
$("model").addEventListener("change", showModel);
$("file").addEventListener("change", (event) => {
  choose(event.target.files[0]);
  event.target.value = ""; // so that the same file can be chosen again
});
$("example").addEventListener("click", example);
$("shown").addEventListener("change", () => document.body.classList.toggle("bare", !$("shown").checked));
$("key").addEventListener("change", () => {
  api.key = $("key").value.trim();
  look();
});
$("ask").addEventListener("input", showCurl);
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  busy(ask);
});
$("compare").addEventListener("click", () => busy(compare));
$("stop").addEventListener("click", () => asking?.abort());
for (const text of SUGGESTED) {
  const chip = make("button", { type: "button" }, text);
  chip.addEventListener("click", () => {
    $("question").value = text;
    showCurl();
    busy(ask);
  });
  $("suggestions").append(chip);
}
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    $("stage").classList.add("over");
  });
}
for (const name of ["dragleave", "drop"]) document.addEventListener(name, () => $("stage").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  choose(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) choose(event.clipboardData.files[0]);
});

slide();
showBudget();
await Promise.all([look(), example().catch(() => $("stage").classList.add("empty"))]);
showCurl();
