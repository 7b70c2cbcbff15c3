// The page: shows a question, takes a vote by key or button, and sends it until the server says that it is kept.

const TOKEN = new URLSearchParams(location.search).get("token") ?? "";
const RETRY_MS = 1000;
const at = id => document.getElementById(id);
const LETTERS = "AB";

const page = {
  state: null, // what the server said last
  isSending: false,
  strength: null,
  ranks: [], // of each answer, or null
  isTying: false,
  shownAt: 0,
  hiddenMs: 0,
  hiddenAt: null,
};

// --- keys -----------------------------------------------------------------------------------

// What the keys do beside votes.
const ACTS = { undo, save: saveRanking, tie: toggleTie, clear: clearRanks };

function press(key) {
  const { state } = page;
  if (!state || page.isSending) return false;
  if (key === "?") {
    at("help").showModal();
    return true;
  }
  const known = KEYS[state.mode][key];
  if (known?.act) ACTS[known.act]();
  else if (known && state.question) vote(known.vote);
  else if (/^[1-9]$/.test(key) && state.question) digit(Number(key));
  else return false;
  return true;
}

function digit(number) {
  if (page.state.mode === "pair" && number <= STRENGTHS.length) {
    page.strength = page.strength === number ? null : number;
    showStrength();
  } else if (page.state.mode === "ranking" && number <= page.ranks.length) rank(number - 1);
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || at("help").open) return;
  if (event.key === "Enter" && event.target instanceof HTMLButtonElement) return; // it presses the button
  const key = event.key.length === 1 ? event.key.toUpperCase() : event.key;
  if (press(key)) event.preventDefault();
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden) page.hiddenAt = performance.now();
  else if (page.hiddenAt !== null) {
    page.hiddenMs += performance.now() - page.hiddenAt;
    page.hiddenAt = null;
  }
});
at("help-button").addEventListener("click", () => press("?"));
at("help-close").addEventListener("click", () => at("help").close());

// --- votes ----------------------------------------------------------------------------------

function vote(choice) {
  const isStrong = choice === "A" || choice === "B";
  const seconds = Math.max(0, (performance.now() - page.shownAt - page.hiddenMs) / 1000);
  send("/vote", { vote: choice, strength: isStrong ? page.strength : null, seconds });
}

function undo() {
  send("/undo", {});
}

// Sends until it is kept: the key makes a vote that arrived twice count once.
async function send(path, said) {
  page.isSending = true;
  document.body.classList.add("sending");
  const body = JSON.stringify({ ...said, number: page.state.number, key: newKey() });
  const headers = { "Content-Type": "application/json", "X-Token": TOKEN };
  let state = null;
  let isLate = false;
  while (state === null) {
    try {
      const response = await fetch(path, { method: "POST", headers, body });
      if (response.ok) state = await response.json();
      else if (response.status === 409) {
        state = await (await fetch("/state", { headers })).json();
        isLate = true;
      } else if (response.status < 500) {
        notice(`Not saved: ${(await response.text()).slice(0, 200)}`);
        break;
      } else throw new Error(String(response.status));
    } catch {
      notice("Not saved yet: the server does not answer. Start dpo-cli label again; this page goes on by itself.");
      await new Promise(done => setTimeout(done, RETRY_MS));
    }
  }
  page.isSending = false;
  document.body.classList.remove("sending");
  if (state) {
    notice(isLate ? "This question was answered in another window. Here is the next one." : "");
    show(state);
  }
}

function newKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), byte => byte.toString(16).padStart(2, "0")).join("");
}

// --- ranking --------------------------------------------------------------------------------

function rank(place) {
  if (page.ranks[place] !== null) {
    page.ranks[place] = null; // once more takes it away; those behind move up
  } else {
    const last = Math.max(0, ...page.ranks.filter(each => each !== null));
    page.ranks[place] = page.isTying && last ? last : last + 1;
  }
  page.isTying = false;
  const levels = [...new Set(page.ranks.filter(each => each !== null))].sort((one, other) => one - other);
  page.ranks = page.ranks.map(each => (each === null ? null : levels.indexOf(each) + 1));
  showRanks();
}

function toggleTie() {
  page.isTying = !page.isTying && page.ranks.some(each => each !== null);
  showRanks();
}

function clearRanks() {
  page.ranks.fill(null);
  page.isTying = false;
  showRanks();
}

function saveRanking() {
  if (!page.state.question) return;
  if (page.ranks.includes(null)) notice(NOT_RANKED);
  else vote(page.ranks);
}

function showRanks() {
  const cards = at("answers").querySelectorAll(".answer");
  cards.forEach((card, place) => {
    const mine = page.ranks[place];
    card.classList.toggle("ranked", mine !== null);
    card.querySelector(".rank").textContent = mine === null ? "" : `rank ${mine}`;
    const button = card.querySelector("button");
    button.setAttribute("aria-pressed", String(mine !== null));
    button.firstChild.data = mine === null ? "Next" : "Take back";
  });
  at("keys").querySelector('[data-key="T"]')?.setAttribute("aria-pressed", String(page.isTying));
  const save = at("keys").querySelector('[data-key="Enter"]');
  if (save) save.classList.toggle("ready", !page.ranks.includes(null));
}

function showStrength() {
  for (const button of at("keys").querySelectorAll(".strength button"))
    button.setAttribute("aria-pressed", String(Number(button.dataset.key) === page.strength));
}

// --- showing --------------------------------------------------------------------------------

function notice(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

function button(key, name) {
  const found = make("button", "", name, " ", make("kbd", "", key));
  found.type = "button";
  found.dataset.key = key;
  found.addEventListener("click", () => press(key));
  return found;
}

function show(state) {
  page.state = state;
  page.strength = null;
  page.isTying = false;
  page.hiddenMs = 0;
  page.hiddenAt = document.hidden ? performance.now() : null;
  const { question, mode } = state;
  document.body.dataset.mode = mode;
  at("end").hidden = question !== null;
  at("prompt").replaceChildren(...(question?.prompt ?? []).map(promptTurn));
  page.ranks = mode === "ranking" && question ? question.answers.map(() => null) : [];
  at("answers").dataset.number = String(question?.answers.length ?? 0);
  at("answers").replaceChildren(...(question?.answers ?? []).map((text, place) => answerCard(text, place, mode)));
  showKeys(mode, question !== null);
  showProgress(state.progress);
  scrollTo(0, 0);
  page.shownAt = performance.now();
  document.body.dataset.number = String(state.number);
}

function promptTurn(message, place, all) {
  const turn = make("div", "turn", markdown(message.text));
  if (all.length > 1) turn.prepend(make("p", "role", message.role));
  return turn;
}

function answerCard(text, place, mode) {
  const name = mode === "ranking" ? String(place + 1) : mode === "pair" ? LETTERS[place] : "Answer";
  const head = make("header", "", make("h2", "", name), make("span", "rank"));
  if (mode === "ranking") head.append(button(String(place + 1), "Next"));
  const card = make("article", "answer card", head, markdown(text));
  card.setAttribute("aria-label", `Answer ${name}`);
  return card;
}

function showKeys(mode, isAsking) {
  const box = at("keys");
  box.replaceChildren();
  const main = make("div", "main");
  const rest = make("div", "rest");
  for (const { key, name, act, is_main: isMain } of Object.values(KEYS[mode])) {
    if (isAsking || act === "undo") (isMain ? main : rest).append(button(key, name));
  }
  if (mode === "pair" && isAsking) {
    const strength = make("div", "strength");
    strength.setAttribute("role", "group");
    strength.setAttribute("aria-label", "How much better");
    STRENGTHS.forEach((name, place) => {
      const found = button(String(place + 1), name);
      found.setAttribute("aria-pressed", "false");
      strength.append(found);
    });
    box.append(strength);
  }
  box.append(main, rest);
}

function showProgress({ done, left, figures, hint }) {
  at("bar").max = Math.max(1, done + left);
  at("bar").value = done;
  at("figures").textContent = figures;
  at("hint").hidden = !hint;
  at("hint").textContent = hint;
}

function showHelp(mode, guideline) {
  at("guideline").replaceChildren(...(guideline ? [markdown(guideline)] : []));
  at("help-keys").replaceChildren(
    ...HELP[mode].flatMap(([key, about]) => [make("dt", "", ...key.split(" ").map(one => make("kbd", "", one))), make("dd", "", about)]),
  );
}

async function start() {
  try {
    const response = await fetch("/state", { headers: { "X-Token": TOKEN } });
    if (!response.ok) throw new Error((await response.text()).slice(0, 200));
    const state = await response.json();
    showHelp(state.mode, state.guideline);
    show(state);
  } catch (error) {
    notice(`There is no question: ${error.message}`);
  }
}

start();
