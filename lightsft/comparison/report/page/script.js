"use strict";
(() => {
  const data = JSON.parse(document.getElementById("examples-data").textContent);
  const get = (id) => document.getElementById("examples-" + id);
  const [list, more, found] = [get("list"), get("more"), get("found")];
  const PAGE = 20;
  let shown = PAGE;

  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const choice = (select, value, text) => {
    const option = element("option", "", text);
    option.value = value;
    select.append(option);
  };
  const scoreOf = (row, column) => {
    const value = (row.scores || {})[data.columns[column]];
    return typeof value === "number" ? value : null;
  };
  const isRight = (value) => value !== null && value > 0.5;
  const isWrong = (value) => value !== null && value < 0.5;

  const card = (row) => {
    const item = element("li", "panel");
    item.append(element("p", "text", row.text ?? ""));
    const note = element("p", "note");
    if (row.target !== undefined && row.target !== null) {
      note.append("right: ", element("strong", "", row.target), " · ");
    }
    note.append("test row " + (row.row ?? "–"));
    const answers = element("ul", "answers");
    data.columns.forEach((name, column) => {
      const value = scoreOf(row, column);
      const className = !data.share ? "" : isRight(value) ? "right" : isWrong(value) ? "wrong" : "";
      const answer = element("li", className, name + ": ");
      answer.append(element("b", "", value === null ? "–" : String(Number(value.toFixed(3)))));
      const said = (row.answers || {})[name];
      if (said) answer.append(" " + said);
      answers.append(answer);
    });
    item.append(note, answers);
    return item;
  };

  const matches = (row) => {
    const words = get("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const text = [row.text, row.target, ...Object.values(row.answers || {})].join(" ").toLowerCase();
    if (!words.every((word) => text.includes(word))) return false;
    const [right, wrong] = [get("right").value, get("wrong").value];
    const [better, worse] = [right && scoreOf(row, right), wrong && scoreOf(row, wrong)];
    if (data.share) return (!right || isRight(better)) && (!wrong || isWrong(worse));
    if (!right || !wrong) return true;
    return better !== null && worse !== null && (data.greater ? better > worse : better < worse);
  };

  const order = (rows) => {
    const by = get("sort").value;
    if (by === "disagreement") return rows;
    if (by === "row") return rows.sort((a, b) => (a.row ?? 0) - (b.row ?? 0));
    const worst = data.greater ? 1 : -1;
    const place = (row) => worst * (scoreOf(row, by) ?? worst * Infinity);
    return rows.sort((a, b) => place(a) - place(b) || 0);
  };

  const update = () => {
    const rows = order(data.rows.filter(matches));
    list.replaceChildren(...rows.slice(0, shown).map(card));
    found.textContent = rows.length + " of " + data.rows.length + " examples";
    more.hidden = rows.length <= shown;
  };

  choice(get("sort"), "disagreement", "disagreement");
  choice(get("sort"), "row", "test row");
  for (const id of ["right", "wrong"]) choice(get(id), "", "any");
  data.columns.forEach((name, column) => {
    choice(get("sort"), column, "worst for " + name);
    for (const id of ["right", "wrong"]) choice(get(id), column, name);
  });
  get("controls").hidden = false;
  get("controls").addEventListener("submit", (event) => event.preventDefault());
  get("controls").addEventListener("input", () => {
    shown = PAGE;
    update();
  });
  more.addEventListener("click", () => {
    shown += PAGE;
    update();
  });
  update();
})();
