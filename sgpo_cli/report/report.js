"use strict";
(function () {
  const PAGE = 10;
  const source = document.getElementById("examples-data");
  if (!source) return;
  const sets = JSON.parse(source.textContent);
  const part = (name) => document.getElementById(name);
  const state = { set: sets[0], rows: [], page: 0 };
  const SORTS = [
    ["as they came", null, 1],
    ["score gap, largest first", (row) => row.scores && row.scores[1] - row.scores[0], -1],
    ["score gap, smallest first", (row) => row.scores && row.scores[1] - row.scores[0], 1],
    ["words changed, most first", (row) => row.edit, -1],
    ["words changed, fewest first", (row) => row.edit, 1],
    ["length ratio, longest first", (row) => row.ratio, -1],
    ["length ratio, shortest first", (row) => row.ratio, 1],
    ["log-perplexity, highest first", (row) => fact(row, "log_ppl"), -1],
  ];

  function fact(row, name) {
    const found = row.facts.find(([key]) => key === name);
    return found && found[1];
  }

  function element(tag, kind, text) {
    const made = document.createElement(tag);
    if (kind) made.className = kind;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function choices(select, names) {
    select.replaceChildren(...names.map(([name, value]) => {
      const option = element("option", "", name);
      option.value = value;
      return option;
    }));
  }

  function openSet() {
    state.set = sets[Number(part("set").value)];
    const counts = new Map();
    for (const row of state.set.rows) counts.set(row.reason || "", (counts.get(row.reason || "") || 0) + 1);
    const reasons = [...counts].sort().map(([reason, count]) =>
      [`${reason ? "dropped: " + reason : "kept"} (${count})`, reason ? "dropped " + reason : "kept"]);
    choices(part("reason"), reasons.length > 1 ? [...reasons, [`all (${state.set.rows.length})`, "all"]] : reasons);
    const usable = SORTS.map((sort, number) => [sort[0], number])
      .filter(([, number]) => !SORTS[number][1] || state.set.rows.some((row) => SORTS[number][1](row) !== undefined));
    choices(part("sort"), usable);
    select();
  }

  function haystack(row) {
    row.haystack ??= [row.id, row.prompt, ...row.parts.map((each) => each[1])].join(" ").toLowerCase();
    // The parts of one text lie apart where the other differs, so each text is there as a whole as well.
    row.whole ??= [-1, 1].map((side) => textOf(row, side).toLowerCase()).join(" ");
    return row.haystack + " " + row.whole;
  }

  function textOf(row, side) {
    return row.parts.filter(([kind]) => kind === 0 || kind === side).map(([, text]) => text).join("");
  }

  function select() {
    const wanted = part("search").value.trim().toLowerCase();
    const shown = part("reason").value;
    const [, key, direction] = SORTS[Number(part("sort").value)];
    state.rows = state.set.rows.filter((row) =>
      (shown === "all" || shown === (row.reason ? "dropped " + row.reason : "kept")) &&
      (!wanted || haystack(row).includes(wanted)));
    if (key) state.rows.sort((a, b) => direction * ((key(a) ?? -direction * Infinity) - (key(b) ?? -direction * Infinity)));
    state.page = 0;
    draw();
  }

  function header(row) {
    const made = element("header");
    const name = element("span");
    name.append(element("b", "", row.id));
    if (row.reason) name.append(" ", element("span", "reason", "dropped: " + row.reason));
    const facts = [];
    if (row.scores) {
      const gap = row.scores[1] - row.scores[0];
      facts.push(`score ${row.scores[0].toFixed(2)} → ${row.scores[1].toFixed(2)} (${gap < 0 ? "−" : "+"}${Math.abs(gap).toFixed(2)})`);
    }
    facts.push(`${Math.round(100 * row.edit)} % of words changed`, `× ${row.ratio.toFixed(2)} as long`);
    for (const [key, value] of row.facts) facts.push(`${key} ${Number(value.toPrecision(4))}`);
    made.append(name, element("span", "", facts.join(" · ")));
    return made;
  }

  function side(row, name, kind, tag) {
    const made = element("div");
    const text = element("div", "text");
    text.dir = "auto";
    for (const [each, words] of row.parts) {
      if (each === 0) text.append(words);
      else if (each === kind) {
        const inner = words.trim();
        const start = words.length - words.trimStart().length;
        text.append(words.slice(0, start));
        if (inner) text.append(element(tag, "", inner), words.slice(start + inner.length));
      }
    }
    made.append(element("h4", "", name), text);
    return made;
  }

  function example(row) {
    const made = element("article", "example");
    const prompt = element("div", "prompt");
    const asked = element("div", "text", row.prompt);
    asked.dir = "auto";
    prompt.append(element("h4", "", "prompt"), asked);
    const both = element("div", "both");
    both.append(side(row, state.set.old, -1, "del"), side(row, state.set.new, 1, "ins"));
    made.append(header(row), prompt, both);
    return made;
  }

  function draw() {
    const pages = Math.max(Math.ceil(state.rows.length / PAGE), 1);
    const start = state.page * PAGE;
    part("list").replaceChildren(...state.rows.slice(start, start + PAGE).map(example));
    const all = state.set.rows.length;
    const sample = all < state.set.total ? `, a random choice from ${state.set.total}` : "";
    part("found").textContent = `${state.rows.length} of ${all} rows${sample}`;
    part("page").textContent = `${state.page + 1} / ${pages}`;
    part("previous").disabled = state.page === 0;
    part("next").disabled = state.page >= pages - 1;
  }

  function turn(by) {
    state.page += by;
    draw();
    part("examples").scrollIntoView();
  }

  let waiting = 0;
  part("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(select, 150);
  });
  part("controls").addEventListener("submit", (event) => event.preventDefault());
  part("set").addEventListener("change", openSet);
  part("reason").addEventListener("change", select);
  part("sort").addEventListener("change", select);
  part("previous").addEventListener("click", () => turn(-1));
  part("next").addEventListener("click", () => turn(1));
  openSet();
})();
