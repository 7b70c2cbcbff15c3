// The token heat: tokens and log(π / π_ref) from their packed form, and how they are shown.

const DIGITS = Array.from({ length: 92 }, (_, i) => String.fromCharCode(35 + i)).filter(c => !"<\\".includes(c)).join("");
const BASE = DIGITS.length;
const NO_RATIO = 0, ZERO_RATIO = BASE * BASE / 2;

// Tokens [{text, ratio, special}] of an answer; a ratio is null where there is none.
function tokensOf(answer, step) {
  const { text, rest = "", lengths, ratios } = answer.heat;
  const joined = text ?? answer.text + rest;
  const end = text === undefined ? answer.text.length : joined.length;
  const tokens = [];
  let place = 0, length = 0;
  for (const digit of lengths) {
    length += DIGITS.indexOf(digit);
    if (digit === DIGITS[BASE - 1]) continue;
    const at = 2 * tokens.length;
    const number = DIGITS.indexOf(ratios[at]) * BASE + DIGITS.indexOf(ratios[at + 1]);
    tokens.push({
      text: joined.slice(place, place + length),
      ratio: number === NO_RATIO ? null : (number - ZERO_RATIO) * step,
      special: place >= end,
    });
    place += length;
    length = 0;
  }
  return tokens;
}

// The class of a token's colour.
function shadeOf(ratio, scale, shades) {
  const shade = Math.min(shades, Math.round(shades * Math.abs(ratio ?? 0) / scale));
  return shade ? (ratio > 0 ? "p" : "n") + shade : "";
}
