"use strict";
/* Sorts the tables of prompts, and builds a prompt's tokens when its row is opened. Everything that
   a server said is set as text, never as markup. */
(() => {
  const UNIT = 10000;
  let parsed = null;
  const data = () => (parsed ??= JSON.parse(document.getElementById("data").textContent));

  const make = (tag, attributes = {}, ...children) => {
    const found = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) found.setAttribute(name, value);
    found.append(...children);
    return found;
  };
  const nats = (units) => (units === null || units === undefined ? "—" : (units / UNIT).toFixed(4).replace("-", "−"));
  const size = (value) => (value ? Math.abs(value).toPrecision(3) : "0");
  const signed = (value) => (value === "nan" ? "not finite" : (value < 0 ? "−" : value > 0 ? "+" : "") + size(value));

  /* A token's colour: how many of the limits its |delta| exceeds. */
  const heatOf = (delta) =>
    delta === null ? null : delta === "nan" ? 4 : data().heat.filter((x) => Math.abs(delta) > x).length;

  const label = (token) => data().texts[token];
  const named = (token) => {
    const id = data().ids[token];
    const own = label(token) === `#${id}`;
    return make("span", {}, make("code", {}, label(token)), id === null || own ? "" : ` #${id}`);
  };

  function candidates(prompt, place) {
    const sides = prompt.c[place];
    if (!sides) return make("p", { class: "note" }, "Candidates were left out to bound the page.");
    if (!sides[0].length && !sides[1].length) return "";
    const rows = new Map();
    sides.forEach((side, which) => {
      for (let at = 0; at < side.length; at += 2) {
        if (!rows.has(side[at])) rows.set(side[at], [null, null]);
        rows.get(side[at])[which] = side[at + 1];
      }
    });
    const best = ([ours, theirs]) => Math.max(ours ?? -Infinity, theirs ?? -Infinity);
    const ordered = [...rows].sort((a, b) => best(b[1]) - best(a[1]));
    const body = make("tbody");
    for (const [token, pair] of ordered) {
      const chosen = token === prompt.t[place];
      const head = make("th", { scope: "row" }, named(token), chosen ? " (this token)" : "");
      const cells = pair.map((value) => make("td", { class: "n" }, nats(value)));
      body.append(make("tr", chosen ? { class: "chosen" } : {}, head, ...cells));
    }
    const heads = ["candidate", "baseline", "target"].map((name, at) =>
      make("th", { scope: "col", ...(at ? { class: "n" } : {}) }, name));
    return make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body);
  }

  function show(panel, prompt, place) {
    const delta = prompt.d[place];
    const lines = [make("p", {}, make("strong", {}, `token ${place + 1} of ${prompt.t.length}: `),
      named(prompt.t[place]))];
    const ours = prompt.l[place];
    lines.push(make("p", {}, delta === null
      ? "not compared"
      : `Δ ${signed(delta)} nats; log-probability ${nats(ours)} by the baseline` +
        (prompt.r[place] ? `; rank ${prompt.r[place]} for the target` : "")));
    if (prompt.at === place) {
      lines.push(make("p", {}, "First difference: the target’s own decode ",
        ...(prompt.o === null ? ["ends here."] : ["goes on with ", named(prompt.o), "."])));
    }
    panel.replaceChildren(...lines, candidates(prompt, place));
  }

  function tokens(prompt, title) {
    const box = make("div", { class: "toks", role: "group", "aria-label": `Tokens of ${title}; arrow keys move` });
    prompt.t.forEach((token, place) => {
      const delta = prompt.d[place];
      const heat = heatOf(delta);
      const one = make("span", {
        class: "tok" + (heat === null ? " unknown" : "") + (prompt.at === place ? " part" : ""),
        "data-place": place, tabindex: place ? -1 : 0, role: "button",
        "aria-label": `${label(token)}, ${delta === null ? "not compared" : "Δ " + signed(delta)}`,
      }, label(token));
      if (heat !== null) one.setAttribute("data-heat", heat);
      box.append(one);
      if (label(token).includes("⏎")) box.append(make("br"));
    });
    const panel = make("div", { class: "seen", "aria-live": "polite" },
      make("p", { class: "note" }, "Point at a token, tap it, or move with the arrow keys, to see both sides."));
    const choose = (one) => {
      box.querySelectorAll(".shown").forEach((other) => other.classList.remove("shown"));
      one.classList.add("shown");
      show(panel, prompt, Number(one.dataset.place));
    };
    const tokenOf = (event) => event.target.closest(".tok");
    box.addEventListener("pointerover", (event) => tokenOf(event) && choose(tokenOf(event)));
    box.addEventListener("click", (event) => tokenOf(event)?.focus());
    box.addEventListener("focusin", (event) => {
      const one = tokenOf(event);
      if (!one) return;
      box.querySelectorAll("[tabindex='0']").forEach((other) => other.setAttribute("tabindex", -1));
      one.setAttribute("tabindex", 0);
      choose(one);
    });
    box.addEventListener("keydown", (event) => {
      const every = [...box.querySelectorAll(".tok")];
      const at = every.indexOf(document.activeElement);
      const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: every.length - 1 }[event.key];
      if (at < 0 || next === undefined) return;
      event.preventDefault();
      every[next]?.focus();
    });
    return make("div", { class: "both" }, box, panel);
  }

  function detail(row, index) {
    const prompt = data().rows[row][index];
    const title = `prompt ${index + 1}`;
    const inside = make("div", { class: "inside" });
    if (data().prompts[index]) inside.append(make("h4", {}, "Prompt"), make("pre", { tabindex: 0 }, data().prompts[index]));
    if (prompt) {
      const what = prompt.forced
        ? "The baseline’s output, teacher-forced"
        : "The baseline’s output, compared up to the first difference";
      inside.append(make("h4", {}, what), tokens(prompt, title));
      inside.append(document.getElementById("legend").content.cloneNode(true));
    } else {
      inside.append(make("p", {}, "The tokens of this prompt were left out to bound the page; the JSON document has them."));
    }
    return inside;
  }

  function toggle(button, row, index) {
    const line = button.closest("tr");
    const open = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!open));
    if (open) {
      line.nextElementSibling.remove();
      return;
    }
    const cell = make("td", { colspan: line.cells.length }, detail(row, index));
    line.after(make("tr", { class: "detail" }, cell));
  }

  const valueOf = (line, column) => {
    const cell = line.cells[column];
    const text = cell.dataset.value ?? cell.textContent.trim();
    const number = Number(text);
    return text === "" || Number.isNaN(number) ? text : number;
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a !== typeof b) return typeof a === "number" ? 1 : -1;
    return a < b ? -1 : a > b ? 1 : 0;
  };

  function sortBy(table, head) {
    const column = head.cellIndex;
    const ascending = head.getAttribute("aria-sort")
      ? head.getAttribute("aria-sort") === "descending"
      : !head.classList.contains("n");
    const body = table.tBodies[0];
    const lines = [...body.rows].filter((line) => !line.classList.contains("detail"));
    const groups = lines.map((line) => {
      const next = line.nextElementSibling;
      return [valueOf(line, column), next?.classList.contains("detail") ? [line, next] : [line]];
    });
    groups.sort((a, b) => (ascending ? 1 : -1) * compare(a[0], b[0]));
    body.append(...groups.flatMap((group) => group[1]));
    table.querySelectorAll("[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  }

  for (const table of document.querySelectorAll("table.prompts")) {
    const row = Number(table.dataset.row);
    for (const head of table.tHead.rows[0].cells) {
      const button = make("button", { type: "button", class: "sort" }, head.textContent);
      button.addEventListener("click", () => sortBy(table, head));
      head.replaceChildren(button);
    }
    for (const line of table.tBodies[0].rows) {
      const head = line.cells[0];
      const index = Number(head.dataset.value);
      const button = make("button", { type: "button", class: "open", "aria-expanded": "false", "aria-label": `prompt ${index + 1}` }, head.textContent.trim());
      button.addEventListener("click", () => toggle(button, row, index));
      head.replaceChildren(button);
    }
  }
})();
