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
