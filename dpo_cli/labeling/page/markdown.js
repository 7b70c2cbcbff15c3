// Markdown as elements: paragraphs, headings, lists, quotes, tables, code, and within a line code, bold and italics.
// Texts reach the page as text nodes alone, so no tag in them means anything; links and pictures stay as they are
// written, since nothing is loaded.

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

// An element for text of any script, whose direction is its own.
function makeText(tag, className, ...children) {
  const element = make(tag, className, ...children);
  element.dir = "auto";
  return element;
}

const INLINE = /(`+)(?!`)([^]*?[^`])\1(?!`)|\*\*(?=\S)([^*\n]+?)(?<=\S)\*\*|(?<![\w*])\*(?=\S)([^*\n]+?)(?<=\S)\*(?![\w*])/g;

function inline(text) {
  const found = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > end) found.push(text.slice(end, match.index));
    if (match[2] !== undefined) found.push(make("code", "", match[2]));
    else if (match[3] !== undefined) found.push(make("strong", "", ...inline(match[3])));
    else found.push(make("em", "", ...inline(match[4])));
    end = match.index + match[0].length;
  }
  if (end < text.length) found.push(text.slice(end));
  return found;
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const BULLET = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const ROW = /^\s*\|.*\|\s*$/;

function markdown(text) {
  const box = make("div", "text");
  const lines = text.split("\n");
  let at = 0;
  let paragraph = [];
  const flush = () => {
    if (paragraph.length) box.append(makeText("p", "", ...inline(paragraph.join("\n"))));
    paragraph = [];
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = line.match(FENCE);
    if (fence) {
      flush();
      const code = [];
      const close = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
      for (at += 1; at < lines.length && !close.test(lines[at]); at += 1) code.push(lines[at]);
      at += 1;
      const block = make("pre", "", make("code", "", code.join("\n")));
      block.dir = "ltr";
      block.tabIndex = 0;
      box.append(block);
      continue;
    }
    const heading = line.match(HEADING);
    if (heading) {
      flush();
      box.append(makeText("p", "heading", ...inline(heading[2])));
    } else if (BULLET.test(line)) {
      flush();
      const list = make("div", "list");
      for (; at < lines.length && (BULLET.test(lines[at]) || (/^\s+\S/.test(lines[at]) && list.lastChild)); at += 1) {
        const item = lines[at].match(BULLET);
        if (item) {
          const row = makeText("p", "item", make("span", "mark", /\d/.test(item[2]) ? item[2] : "•"), ...inline(item[3]));
          row.dataset.depth = String(Math.min(3, Math.floor(item[1].replace(/\t/g, "    ").length / 2)));
          list.append(row);
        } else list.lastChild.append("\n", ...inline(lines[at].trim()));
      }
      box.append(list);
      continue;
    } else if (/^ {0,3}>/.test(line)) {
      flush();
      const quote = [];
      for (; at < lines.length && /^ {0,3}>/.test(lines[at]); at += 1) quote.push(lines[at].replace(/^ {0,3}> ?/, ""));
      box.append(makeText("blockquote", "", ...inline(quote.join("\n"))));
      continue;
    } else if (ROW.test(line) && /^\s*\|[\s:|-]+\|\s*$/.test(lines[at + 1] ?? "")) {
      flush();
      const table = make("table", "");
      const cells = row => row.trim().slice(1, -1).split("|").map(cell => cell.trim());
      table.append(make("tr", "", ...cells(line).map(cell => makeText("th", "", ...inline(cell)))));
      for (at += 2; at < lines.length && ROW.test(lines[at]); at += 1)
        table.append(make("tr", "", ...cells(lines[at]).map(cell => makeText("td", "", ...inline(cell)))));
      box.append(make("div", "table", table));
      continue;
    } else if (!line.trim()) flush();
    else paragraph.push(line);
    at += 1;
  }
  flush();
  if (!box.childNodes.length) box.append(make("p", "nothing", "(an empty text)"));
  return box;
}
