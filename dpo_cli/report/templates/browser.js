// The prompt browser. Texts of models and data reach the page as text nodes and in no other way.

const page = JSON.parse(document.getElementById("samples-data").textContent);
const DEFAULTS = { prompt: "", only: "all", sort: "id", find: "", view: "diff" };
const state = { ...DEFAULTS };
const at = id => document.getElementById(id);

// --- what a sample is ---------------------------------------------------------------------

const FILTERS = {
  all: () => true,
  win: sample => sample.win > 0.5,
  tie: sample => sample.win === 0.5,
  loss: sample => sample.win < 0.5,
  disagreement: sample => sample.consistent === false,
  none: sample => sample.win === undefined,
};
const OUTCOMES = { win: "win", tie: "tie", loss: "loss", none: "no verdict" };

const byDown = value => (a, b) => value(b) - value(a) || byId(a, b);
const byId = (a, b) => (a.id < b.id ? -1 : a.id > b.id ? 1 : 0);
const lengthDifference = sample => sample.dpo.num_tokens - sample.sft.num_tokens;
const SORTS = {
  id: byId,
  kl: byDown(sample => sample.kl ?? -Infinity),
  long: byDown(sample => sample.dpo.num_tokens),
  length: byDown(sample => Math.abs(lengthDifference(sample))),
  win: byDown(sample => sample.win ?? -1),
  loss: byDown(sample => -(sample.win ?? 2)),
};

const outcomeOf = sample => ["win", "tie", "loss", "none"].find(name => FILTERS[name](sample));
const number = (value, digits) => value.toFixed(digits).replace("-", "\u2212");
const signed = (value, digits) => (value > 0 ? "+" : "") + number(value, digits);
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

function words(sample) {
  sample.words ??= [
    sample.id, ...sample.prompt.map(message => message.content),
    sample.chosen ?? "", sample.rejected ?? "", sample.sft.text, sample.dpo.text,
  ].join("\n").toLowerCase();
  return sample.words;
}

// --- elements -----------------------------------------------------------------------------

// An element with a class; children are elements, texts, or nothing.
function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children.filter(child => child !== null && child !== undefined));
  return element;
}

function makeText(tag, className, ...children) {
  const element = make(tag, className, ...children);
  element.dir = "auto";
  return element;
}

// A sign in place of words, which are its name.
function mark(sign, name) {
  const element = make("span", "odd", sign);
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", name);
  element.title = name;
  return element;
}

// --- the list -----------------------------------------------------------------------------

let shown = [];

function updateList() {
  const find = state.find.trim().toLowerCase();
  shown = page.samples
    .filter(sample => FILTERS[state.only](sample) && (!find || words(sample).includes(find)))
    .sort(SORTS[state.sort]);
  at("list").replaceChildren(...shown.map(option));
  at("count").textContent = `${shown.length} of ${plural(page.samples.length, "prompt")}`;
  at("empty").hidden = shown.length > 0;
  at("list").hidden = shown.length === 0;
  if (!shown.some(sample => sample.id === state.prompt)) state.prompt = shown[0]?.id ?? "";
}

function option(sample) {
  const outcome = outcomeOf(sample);
  const facts = [];
  if (sample.kl !== undefined) facts.push(`KL ${number(sample.kl, 2)}`);
  facts.push(`${signed(lengthDifference(sample), 0)} tokens`);
  const element = make(
    "div", `option ${outcome}`,
    makeText("span", "opening", sample.prompt.at(-1).content.slice(0, 160)),
    make(
      "span", "facts",
      make("span", "outcome", OUTCOMES[outcome] + (sample.win === undefined ? "" : ` ${number(sample.win, 2)}`)),
      sample.consistent === false ? mark("⇄", "orders disagree") : null,
      make("span", "measures", facts.join(" · ")),
    ),
  );
  element.id = `option-${sample.id}`;
  element.setAttribute("role", "option");
  element.addEventListener("click", () => select(sample.id));
  return element;
}

// --- one sample ---------------------------------------------------------------------------

function updateDetail() {
  const index = shown.findIndex(sample => sample.id === state.prompt);
  const sample = shown[index];
  for (const element of at("list").children) element.setAttribute("aria-selected", element.id === `option-${state.prompt}`);
  if (sample) {
    at("list").setAttribute("aria-activedescendant", `option-${sample.id}`);
    showInList(at(`option-${sample.id}`));
  } else {
    at("list").removeAttribute("aria-activedescendant");
  }
  at("place").textContent = sample ? `${index + 1} / ${shown.length}` : "0 / 0";
  at("before").disabled = index <= 0;
  at("after").disabled = index < 0 || index === shown.length - 1;
  at("legend").hidden = state.view !== "heat";
  at("diff-legend").hidden = state.view !== "diff";
  at("detail").replaceChildren(...(sample ? detailOf(sample) : []));
  highlight();
}

// Scroll the list, and not the page.
function showInList(element) {
  const list = at("list");
  const top = element.offsetTop - list.offsetTop;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + element.offsetHeight > list.scrollTop + list.clientHeight) {
    list.scrollTop = top + element.offsetHeight - list.clientHeight;
  }
}

function detailOf(sample) {
  const changes = state.view === "diff" ? diffOf(sample.sft.text, sample.dpo.text) : null;
  const ratios = state.view === "heat" && sample.dpo.heat ? ratiosOf(sample.dpo) : null;
  return [
    headOf(sample),
    ...sample.prompt.map(message => turnOf(message, sample.prompt.length)),
    make(
      "div", "answers",
      answerOf("SFT", "sft", changes ? textOf(changes[0], "del") : sample.sft.text, factsOf(sample.sft)),
      answerOf("Tuned", "dpo", ratios ?? (changes ? textOf(changes[1], "ins") : sample.dpo.text), factsOf(sample.dpo)),
      sample.chosen === undefined ? null : answerOf("Chosen in the data", "data", sample.chosen, ""),
      sample.rejected === undefined ? null : answerOf("Rejected in the data", "data", sample.rejected, ""),
    ),
    state.view === "diff" && !changes ? make("p", "remark", "These answers are too long for a word diff.") : null,
    state.view === "heat" && !ratios ? make("p", "remark", "No token values were kept for this answer.") : null,
  ].filter(Boolean);
}

function headOf(sample) {
  const outcome = outcomeOf(sample);
  const facts = [];
  if (sample.win !== undefined) facts.push(`P(tuned beats SFT) ${number(sample.win, 2)}`);
  if (sample.win_chosen !== undefined) facts.push(`P(tuned beats chosen) ${number(sample.win_chosen, 2)}`);
  if (sample.kl !== undefined) facts.push(`KL ${number(sample.kl, 2)} nats at T = 1`);
  facts.push(`${signed(lengthDifference(sample), 0)} tokens`);
  const link = make("a", "", make("code", "", sample.id.slice(0, 8)));
  link.href = `#${hashOf({ ...DEFAULTS, prompt: sample.id })}`;
  link.title = `Link to prompt ${sample.id}`;
  return make(
    "header", outcome,
    make("span", "badge", OUTCOMES[outcome]),
    sample.consistent === false ? make("span", "badge odd", "orders disagree") : null,
    make("span", "facts", facts.join(" · ")),
    link,
  );
}

function turnOf(message, numTurns) {
  const said = [message.reasoning_content, message.content, message.tool_calls].filter(Boolean).join("\n");
  const role = numTurns === 1 ? "Prompt" : message.role.slice(0, 1).toUpperCase() + message.role.slice(1);
  return make("div", "turn", make("h4", "", role), makeText("div", "text", said));
}

function answerOf(name, kind, content, facts) {
  const isText = typeof content === "string";
  return make(
    "div", `answer ${kind}`,
    make("h4", "", name),
    isText && !content.trim() ? make("p", "nothing", "no visible text") : makeText("div", "text", ...(isText ? [content] : content)),
    facts ? make("p", "facts", facts) : null,
  );
}

function factsOf(answer) {
  const facts = [plural(answer.num_tokens, "token")];
  if (!answer.finished) facts.push("cut off at the limit");
  if (typeof answer.well_formed === "boolean") facts.push(answer.well_formed ? "well formed" : "not well formed");
  if (typeof answer.reward === "number") facts.push(`reward ${number(answer.reward, 2)}`);
  return facts.join(" · ");
}

function textOf(runs, tag) {
  return runs.map(run => (run.same ? run.text : make(tag, "", run.text)));
}

// --- log-ratios ---------------------------------------------------------------------------

// The tokens as one stop of the Tab key; arrow keys go from token to token, a line below says the value.
function ratiosOf(answer) {
  const value = make("output", "value", "Point at a token, or go through them with the arrow keys.");
  const tokens = tokensOf(answer, page.step).map((token, i, all) => {
    const shade = shadeOf(token.ratio, page.scale, page.shades);
    const element = make("span", `t ${shade}${token.special ? " special" : ""}`, token.text.replaceAll("\n", "↵\n"));
    const ratio = token.ratio === null ? "no value" : `${signed(token.ratio, 2)} nats`;
    element.title = ratio;
    element.tabIndex = i ? -1 : 0;
    const tell = () => {
      value.textContent = `${JSON.stringify(token.text)}: ${ratio}, token ${i + 1} of ${all.length}`;
    };
    element.addEventListener("pointerenter", tell);
    element.addEventListener("focus", tell);
    return element;
  });
  const strip = make("span", "tokens", ...tokens);
  strip.setAttribute("role", "group");
  strip.setAttribute("aria-label", "Tokens of the tuned answer");
  strip.addEventListener("keydown", event => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const next = step && tokens[tokens.indexOf(event.target) + step];
    if (!next) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  return [strip, value];
}

// --- words that were searched for ---------------------------------------------------------

function highlight() {
  if (!("highlights" in CSS)) return;
  CSS.highlights.delete("found");
  const find = state.find.trim().toLowerCase();
  if (!find) return;
  const ranges = [];
  const walker = document.createTreeWalker(at("detail"), NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const text = node.data.toLowerCase();
    if (text.length !== node.data.length) continue;
    for (let place = text.indexOf(find); place >= 0; place = text.indexOf(find, place + find.length)) {
      const range = new Range();
      range.setStart(node, place);
      range.setEnd(node, place + find.length);
      ranges.push(range);
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}

// --- state --------------------------------------------------------------------------------

function hashOf(values) {
  return new URLSearchParams(Object.entries(values).filter(([name, value]) => value !== DEFAULTS[name])).toString();
}

// Take the state over from the address; false where it names none of it.
function readHash() {
  const fields = new URLSearchParams(location.hash.slice(1));
  if (![...fields.keys()].some(name => name in DEFAULTS)) return false;
  for (const name in DEFAULTS) state[name] = fields.get(name) ?? DEFAULTS[name];
  for (const [name, known] of [["only", FILTERS], ["sort", SORTS], ["view", { plain: 1, diff: 1, heat: 1 }]]) {
    if (!Object.hasOwn(known, state[name])) state[name] = DEFAULTS[name];
  }
  const wanted = state.prompt;
  const isThere = page.samples.some(sample => sample.id === wanted);
  showControls();
  updateList();
  if (wanted && state.prompt !== wanted) {
    at("count").textContent += isThere
      ? `; prompt ${wanted.slice(0, 8)} is not among them`
      : `; prompt ${wanted.slice(0, 8)} is not on this page, but may be in ${page.file}`;
  }
  updateDetail();
  return true;
}

function showControls() {
  for (const name of ["only", "view"]) {
    for (const radio of document.getElementsByName(name)) radio.checked = radio.value === state[name];
  }
  at("sort").value = state.sort;
  at("find").value = state.find;
}

// Scroll to the browser unless it is in sight.
function showBrowser() {
  const { top, bottom } = at("detail").getBoundingClientRect();
  if (bottom < 0 || top > innerHeight) at("samples").scrollIntoView();
}

function writeHash() {
  history.replaceState(null, "", `#${hashOf(state)}`);
}

function change(name, value) {
  state[name] = value;
  if (name !== "view") updateList();
  updateDetail();
  writeHash();
}

function select(id) {
  state.prompt = id;
  updateDetail();
  writeHash();
}

function move(step) {
  const index = shown.findIndex(sample => sample.id === state.prompt);
  const next = shown[Math.min(Math.max(index + step, 0), shown.length - 1)];
  if (next && next.id !== state.prompt) select(next.id);
}

// --- keys ---------------------------------------------------------------------------------

const KEYS = {
  j: () => move(1),
  k: () => move(-1),
  d: () => toggleView("diff"),
  t: () => toggleView("heat"),
  "/": () => {
    at("samples").scrollIntoView();
    at("find").focus();
    at("find").select();
  },
  "?": () => at("help").showModal(),
};
const LIST_KEYS = {
  ArrowDown: () => move(1),
  ArrowUp: () => move(-1),
  PageDown: () => move(10),
  PageUp: () => move(-10),
  Home: () => move(-shown.length),
  End: () => move(shown.length),
};

function toggleView(view) {
  if (view === "heat" && page.scale === null) return;
  change("view", state.view === view ? "plain" : view);
  showControls();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || at("help").open) return;
  const field = event.target.closest?.("input[type=search], select");
  if (event.key === "Escape" && event.target === at("find")) {
    event.preventDefault();
    at("find").value = "";
    change("find", "");
    at("list").focus();
    return;
  }
  if (event.key === "Enter" && event.target === at("find")) at("list").focus();
  if (field) return;
  const action = (event.target === at("list") && LIST_KEYS[event.key]) || KEYS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

// --- start --------------------------------------------------------------------------------

function start() {
  for (const name of ["only", "view"]) {
    for (const radio of document.getElementsByName(name)) {
      radio.addEventListener("change", () => change(name, radio.value));
    }
  }
  for (const name in FILTERS) {
    const count = page.samples.filter(FILTERS[name]).length;
    at(`num-${name}`).textContent = count;
    at(`only-${name}`).parentElement.hidden = count === 0 || (name === "none" && count === page.samples.length);
  }
  at("view-heat").parentElement.hidden = page.scale === null;
  at("sort").addEventListener("change", event => change("sort", event.target.value));
  at("find").addEventListener("input", event => change("find", event.target.value));
  at("before").addEventListener("click", () => move(-1));
  at("after").addEventListener("click", () => move(1));
  at("clear").addEventListener("click", () => {
    Object.assign(state, { only: "all", find: "" });
    showControls();
    updateList();
    updateDetail();
    writeHash();
    at("list").focus();
  });
  at("keys").addEventListener("click", () => at("help").showModal());
  at("browser").hidden = false;
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", () => readHash() && showBrowser());
  if (readHash()) {
    showBrowser();
    return;
  }
  showControls();
  updateList();
  updateDetail();
}

start();
