// What the page does beside its charts: light and dark, the table of candidates, and changes as they are stored.
"use strict";
(() => {
  const root = document.documentElement;
  const PREFERS_DARK = matchMedia("(prefers-color-scheme: dark)");

  function theme() {
    const button = document.querySelector("button.theme");
    button.hidden = false;
    button.onclick = () => {
      const isDark = root.dataset.theme ? root.dataset.theme === "dark" : PREFERS_DARK.matches;
      root.dataset.theme = isDark ? "light" : "dark";
      try { localStorage.setItem("evomerge-theme", root.dataset.theme); } catch { /* no storage here */ }
      evomerge.again();
    };
    PREFERS_DARK.addEventListener("change", () => evomerge.again());
  }

  // ---- the table of candidates: sorted and filtered here, the address says how ----------------------------

  const KINDS = {
    score: (v) => v.toFixed(3), count: (v) => v.toLocaleString("en"), signed: (v) => (v > 0 ? "+" : "") + v.toFixed(3),
  };

  function candidates(shown) {
    const section = document.getElementById("candidates");
    if (!section || !shown) return;
    const form = section.querySelector("form") || reportFilters(section, shown);
    const query = Object.fromEntries(new URLSearchParams(location.search));
    const state = {
      sort: section.dataset.sort || query.sort || "-objective",
      page: Number(section.dataset.page || query.page || 1),
      text: form.elements.text.value, origin: form.elements.origin.value, state: form.elements.state.value,
    };
    const change = (more) => {
      Object.assign(state, more);
      section.dataset.sort = state.sort;
      section.dataset.page = state.page;
      address(state);
      table(section, shown, state, change);
    };
    form.oninput = () => change({
      page: 1, text: form.elements.text.value, origin: form.elements.origin.value, state: form.elements.state.value,
    });
    form.onsubmit = (event) => event.preventDefault();
    table(section, shown, state, change);
  }

  function reportFilters(section, shown) {
    const form = document.createElement("form");
    form.className = "filters";
    form.setAttribute("role", "search");
    form.setAttribute("aria-label", "Filter candidates");
    const box = (name, control) => {
      const label = form.appendChild(document.createElement("label"));
      label.append(`${name} `);
      control.name = name === "find" ? "text" : name;
      label.append(control);
    };
    box("find", Object.assign(document.createElement("input"), { type: "search", placeholder: "number, label, error" }));
    for (const [name, list] of [["origin", shown.origins], ["state", shown.states]]) {
      const select = document.createElement("select");
      select.add(new Option("all", ""));
      list.forEach((value) => select.add(new Option(value, value)));
      box(name, select);
    }
    section.querySelector(".tables").before(form);
    return form;
  }

  function address(state) {
    const words = new URLSearchParams(location.search);
    for (const [name, value] of Object.entries(state)) {
      if (value === "" || (name === "page" && value === 1)) words.delete(name);
      else words.set(name, value);
    }
    try { history.replaceState(null, "", `?${words}${location.hash}`); } catch { /* a file has no address to keep */ }
  }

  function table(section, shown, state, change) {
    const labels = shown.columns.map((c) => c.label), text = state.text.toLowerCase();
    const label = state.sort.replace(/^-/, ""), down = state.sort.startsWith("-");
    const place = Math.max(0, labels.indexOf(label));
    const rows = shown.rows.filter((r) => (!state.origin || r[3] === state.origin) && (!state.state || r[4] === state.state)
      && (!text || `${r[0]} ${r[1]} ${r[r.length - 1]}`.toLowerCase().includes(text)));
    const lacks = (v) => v === null || v === "";
    rows.sort((a, b) => {
      const x = a[place], y = b[place];
      if (lacks(x) || lacks(y)) return lacks(x) - lacks(y);
      const order = typeof x === "number" ? x - y : x < y ? -1 : x > y ? 1 : 0;
      return down ? -order : order;
    });
    const pages = Math.max(1, Math.ceil(rows.length / shown.page)), page = Math.min(Math.max(1, state.page), pages);
    const box = section.querySelector(".tables");
    const focused = box.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    const drawn = document.createElement("table");
    drawn.createCaption().textContent = `${rows.length.toLocaleString("en")} of ${shown.rows.length.toLocaleString("en")} candidates`;
    const head = drawn.createTHead().insertRow();
    shown.columns.forEach((column) => {
      const cell = head.appendChild(document.createElement("th"));
      cell.scope = "col";
      if (!["text", "candidate"].includes(column.kind)) cell.className = "n";
      if (column.label === label) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      const button = cell.appendChild(document.createElement("button"));
      button.type = "button";
      button.dataset.key = `sort ${column.label}`;
      button.textContent = column.label;
      const first = column.kind === "text" ? column.label : `-${column.label}`;
      const other = column.kind === "text" ? `-${column.label}` : column.label;
      button.onclick = () => change({ sort: state.sort === first ? other : first, page: 1 });
    });
    const body = drawn.createTBody();
    for (const row of rows.slice((page - 1) * shown.page, page * shown.page)) {
      const line = body.insertRow();
      row.forEach((value, i) => cell(line.insertCell(), value, shown.columns[i].kind));
    }
    const scroll = document.createElement("div");
    scroll.className = "scroll";
    scroll.append(drawn);
    box.replaceChildren(scroll, pager(page, pages, change));
    if (focused) [...box.querySelectorAll("button")].find((b) => b.dataset.key === focused)?.focus();
  }

  function cell(element, value, kind) {
    if (!["text", "candidate"].includes(kind)) element.className = "n";
    if (kind === "candidate" && document.body.dataset.events) {
      const link = element.appendChild(document.createElement("a"));
      link.href = `?other=${value}#pair`;
      link.textContent = `#${value}`;
    } else if (kind === "candidate") element.textContent = `#${value}`;
    else element.textContent = value === null || value === "" ? "–" : (KINDS[kind] || String)(value);
  }

  function pager(page, pages, change) {
    const bar = document.createElement("div");
    bar.className = "pager";
    const button = (name, to) => {
      const one = bar.appendChild(document.createElement("button"));
      Object.assign(one, { type: "button", textContent: name, disabled: to < 1 || to > pages });
      one.dataset.key = name;
      one.onclick = () => change({ page: to });
    };
    button("Previous", page - 1);
    bar.appendChild(document.createElement("span")).textContent = `page ${page} of ${pages}`;
    button("Next", page + 1);
    return bar;
  }

  // ---- changes, as they are stored -------------------------------------------------------------------------

  function apply(change) {
    if (change.overview) {
      const box = document.getElementById("overview");
      if (box.dataset.digest !== change.overview.digest) {
        const open = box.querySelector("details[open]");
        box.innerHTML = change.overview.html;
        box.dataset.digest = change.overview.digest;
        if (open && box.querySelector("details")) box.querySelector("details").open = true;
      }
      document.title = change.overview.title;
    }
    if (change.stop !== undefined) document.getElementById("stop").innerHTML = change.stop;
    for (const panel of change.panels || []) update(panel);
  }

  function update(panel) {
    const section = document.getElementById(panel.id);
    if (!section) { location.reload(); return; }  // a panel that the study had no use for before
    if (panel.id === "candidates") { candidates(panel.chart); return; }
    if (section.dataset.digest !== panel.digest) {
      const box = section.querySelector(".tables"), open = box.querySelector("details")?.open;
      box.innerHTML = panel.html;
      const details = box.querySelector("details");
      if (details) details.open = open ?? false;
      section.querySelector("h2").textContent = panel.title;
      section.dataset.digest = panel.digest;
    }
    evomerge.show(panel.id, panel.chart);
  }

  function listen(where) {
    const live = document.getElementById("live");
    const say = (state, text) => { live.className = state; live.textContent = text; };
    const events = new EventSource(where);
    events.onopen = () => say("on", "live");
    events.onerror = () => say("off", "not connected, trying again");
    events.onmessage = (event) => {
      apply(JSON.parse(event.data));
      document.body.dataset.updates = String(1 + Number(document.body.dataset.updates || 0));
    };
  }

  function report() {
    const all = JSON.parse(document.getElementById("charts").textContent);
    candidates(all.candidates);
    for (const [id, chart] of Object.entries(all)) if (id !== "candidates") evomerge.show(id, chart);
    let chosen;
    addEventListener("beforeprint", () => {  // on paper everything is light and nothing is folded
      chosen = root.dataset.theme;
      root.dataset.theme = "light";
      evomerge.again();
      document.querySelectorAll("details").forEach((details) => { details.open = true; });
    });
    addEventListener("afterprint", () => {
      if (chosen) root.dataset.theme = chosen;
      else delete root.dataset.theme;
      evomerge.again();
    });
  }

  document.addEventListener("DOMContentLoaded", () => {
    theme();
    document.querySelectorAll("details.numbers").forEach((details) => { details.open = false; });
    if (document.getElementById("charts")) report();
    else if (document.body.dataset.events) listen(document.body.dataset.events);
  });
})();
