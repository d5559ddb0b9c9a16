// Text of a model as DOM nodes. Everything becomes text nodes, so markup in an answer is shown and
// never runs. Fenced code, inline code, bold, headings and bullets are all that is read.

const FENCE = /^(`{3,})([\w+#.-]*)[^\n`]*$/;

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

// [{code: false, text}, {code: true, language, text}, ...]; an open fence counts until the end.
export function blocks(text) {
  const found = [];
  let lines = [];
  let fence = null;
  const end = () => {
    const joined = lines.join("\n");
    if (fence) found.push({ code: true, language: fence.language, text: joined });
    else if (joined.trim()) found.push({ code: false, text: joined.replace(/^\n+|\n+$/g, "") });
    lines = [];
  };
  for (const line of text.split("\n")) {
    const mark = line.trim().match(FENCE);
    if (!fence && mark) {
      end();
      fence = { ticks: mark[1], language: mark[2] };
    } else if (fence && line.trim() === fence.ticks) {
      end();
      fence = null;
    } else {
      lines.push(line);
    }
  }
  end();
  return found;
}

function inline(text) {
  const heading = text.match(/^#{1,6} (.*)/);
  const paragraph = element("p", "", heading ? "heading" : "");
  text = heading ? heading[1] : text.replace(/^(\s*)[-*] /, "$1•\u2002");
  for (const part of text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)) {
    if (part.length > 2 && part.startsWith("`") && part.endsWith("`")) {
      paragraph.append(element("code", part.slice(1, -1)));
    } else if (part.length > 4 && part.startsWith("**") && part.endsWith("**")) {
      paragraph.append(element("strong", part.slice(2, -2)));
    } else if (part) {
      paragraph.append(part);
    }
  }
  return paragraph;
}

function codeBlock(block) {
  const figure = element("figure");
  const head = element("figcaption", block.language || "code");
  const copy = element("button", "Copy");
  copy.type = "button";
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(block.text);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  });
  head.append(copy);
  const pre = element("pre");
  pre.tabIndex = 0; // so that it can be scrolled by keyboard
  pre.append(element("code", block.text));
  figure.append(head, pre);
  return figure;
}

function node(block) {
  if (block.code) return codeBlock(block);
  const group = element("div", "", "text");
  for (const paragraph of block.text.split(/\n{2,}/)) {
    const lines = element("div", "", "paragraph");
    lines.append(...paragraph.split("\n").map(inline));
    group.append(lines);
  }
  return group;
}

// Shows `text` in `target`. While an answer grows only its last block changes, so what is before
// stays as it is, selected or scrolled.
export function show(target, text) {
  const wanted = blocks(text);
  const known = target.shown ?? [];
  let same = 0;
  while (
    same < Math.min(wanted.length, known.length) - 1 &&
    JSON.stringify(wanted[same]) === JSON.stringify(known[same])
  ) {
    same += 1;
  }
  while (target.childNodes.length > same) target.lastChild.remove();
  for (const block of wanted.slice(same)) target.append(node(block));
  target.shown = wanted;
}
