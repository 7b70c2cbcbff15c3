// The word diff: which words of two texts are in their longest common subsequence.

const CJK = "\\p{Script=Han}\\p{Script=Hiragana}\\p{Script=Katakana}";
// A word with the space behind it; a CJK character or a sign counts as a word.
const WORDS = new RegExp(`(?:(?:(?![${CJK}])[\\p{L}\\p{M}\\p{N}_'’])+|[^\\s])\\s*|\\s+`, "gu");
const MOST_CELLS = 4_000_000;

// The texts as runs [{text, same}], or null where they are too long to compare.
function diffOf(before, after) {
  const [a, b] = [before, after].map(text => text.match(WORDS) ?? []);
  const [x, y] = [a, b].map(words => words.map(word => word.trimEnd()));
  const same = [new Uint8Array(a.length), new Uint8Array(b.length)];
  let start = 0;
  while (start < x.length && start < y.length && x[start] === y[start]) same[0][start] = same[1][start++] = 1;
  let [m, n] = [x.length, y.length];
  while (m > start && n > start && x[m - 1] === y[n - 1]) same[0][--m] = same[1][--n] = 1;
  if ((m - start) * (n - start) > MOST_CELLS) return null;
  markCommon(x.slice(start, m), y.slice(start, n), start, same);
  return [runsOf(a, same[0]), runsOf(b, same[1])];
}

// Mark one longest common subsequence of x and y, which lie at an offset in their texts.
function markCommon(x, y, offset, same) {
  const width = y.length + 1;
  const longest = new Uint16Array((x.length + 1) * width);
  for (let i = x.length - 1; i >= 0; i--) {
    for (let j = y.length - 1; j >= 0; j--) {
      const at = i * width + j;
      longest[at] = x[i] === y[j]
        ? longest[at + width + 1] + 1
        : Math.max(longest[at + width], longest[at + 1]);
    }
  }
  for (let i = 0, j = 0; i < x.length && j < y.length;) {
    if (x[i] === y[j]) {
      same[0][offset + i++] = same[1][offset + j++] = 1;
    } else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) {
      i++;
    } else {
      j++;
    }
  }
}

// Neighbors of one kind joined; the space behind a changed run is not part of it.
function runsOf(words, same) {
  const runs = [];
  const add = (text, isSame) => {
    const last = runs.at(-1);
    if (last && last.same === isSame) last.text += text;
    else if (text) runs.push({ text, same: isSame });
  };
  words.forEach((word, i) => {
    const end = same[i] || same[i + 1] !== 0 ? word.trimEnd().length : word.length;
    add(word.slice(0, end), Boolean(same[i]) || !word.trim());
    add(word.slice(end), true);
  });
  return runs;
}

// Token by token: tokens and log(π / π_ref) from their lengths and hundredths, and how they are shown.

// Tokens [{text, ratio, special}] of an answer; a ratio is null where there is none.
function tokensOf(answer, step) {
  const { text, rest = "", lengths, ratios } = answer.heat;
  const joined = text ?? answer.text + rest;
  const end = text === undefined ? answer.text.length : joined.length;
  let place = 0;
  return lengths.map((length, i) => {
    const begin = place;
    place += length;
    return {
      text: joined.slice(begin, place),
      ratio: ratios[i] === null ? null : ratios[i] * step,
      special: begin >= end,
    };
  });
}

// The class of a token's color.
function shadeOf(ratio, scale, shades) {
  const shade = Math.min(shades, Math.round(shades * Math.abs(ratio ?? 0) / scale));
  return shade ? (ratio > 0 ? "p" : "n") + shade : "";
}
