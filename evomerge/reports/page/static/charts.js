// Draws the charts of a study's panels: one function a panel, from the plain data of evomerge.reports.panels.
"use strict";
const evomerge = (() => {
  const charts = new Map();   // id of a panel -> its chart
  const data = new Map();     // id of a panel -> what it shows
  const kept = new Map();     // id of a panel -> what the reader has chosen there

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const isDark = () => getComputedStyle(document.documentElement).colorScheme.includes("dark");
  const COLOURS = {
    light: ["#4263eb", "#e8590c", "#2b8a3e", "#9c36b5", "#0b7285", "#c2255c", "#866118", "#495057"],
    dark: ["#8aa2ff", "#ffa26b", "#69d391", "#d99cf0", "#5fd0e0", "#ff8fb1", "#e2c16f", "#adb5bd"],
  };
  const palette = () => COLOURS[isDark() ? "dark" : "light"];
  const ramp = () => isDark() ? ["#1d2535", "#3a4f9e", "#8aa2ff", "#e6ebff"] : ["#f3f5fb", "#aebcf7", "#4263eb", "#1c2c7a"];
  const fixed = (value, digits = 3) => value === null || value === undefined ? "–" : value.toFixed(digits);
  const signed = (value) => value === null || value === undefined ? "–" : (value > 0 ? "+" : "") + value.toFixed(3);

  // A tooltip as elements: texts of models and tasks are never read as HTML.
  function tip(title, rows) {
    const box = document.createElement("div");
    box.className = "tip";
    const head = box.appendChild(document.createElement("b"));
    head.textContent = title;
    for (const [name, value] of rows) {
      const line = box.appendChild(document.createElement("div"));
      line.appendChild(document.createElement("span")).textContent = name;
      line.appendChild(document.createElement("strong")).textContent = value;
    }
    return box;
  }

  function base(more) {
    const ink = css("--ink"), soft = css("--soft");
    return {
      animation: false,
      color: palette(),
      textStyle: { fontFamily: getComputedStyle(document.body).fontFamily, color: ink },
      grid: { left: 8, right: 20, top: 34, bottom: 8, containLabel: true },
      tooltip: {
        confine: true, backgroundColor: css("--card"), borderColor: css("--line"), padding: [7, 10],
        textStyle: { color: ink, fontSize: 13 }, ...(more.tooltip || {}),
      },
      legend: {
        top: 0, left: 0, itemWidth: 14, itemHeight: 9, itemGap: 16, textStyle: { color: soft, fontSize: 12 },
        inactiveColor: css("--line"), ...(more.legend || {}),
      },
      ...Object.fromEntries(Object.entries(more).filter(([name]) => name !== "tooltip" && name !== "legend")),
    };
  }

  const axis = (more) => ({
    nameTextStyle: { color: css("--soft"), fontSize: 12 }, nameLocation: "middle", nameGap: 28,
    axisLabel: { color: css("--soft"), fontSize: 12, hideOverlap: true, ...(more.axisLabel || {}) },
    axisLine: { lineStyle: { color: css("--line") } }, axisTick: { show: false },
    splitLine: { lineStyle: { color: css("--line"), opacity: .7 } },
    ...Object.fromEntries(Object.entries(more).filter(([name]) => name !== "axisLabel")),
  });
  const scoreLabel = { formatter: (value) => Number(value.toFixed(3)).toString() };

  // Lines with their labels: of several that lie close together one label names all.
  function labelled(references, close) {
    const sorted = [...references].sort((a, b) => b.score - a.score).map((r) => ({ ...r, text: "" }));
    let head = null;
    for (const r of sorted) {
      if (head && head.score - r.score < close) head.text = `${head.text}, ${r.name}`;
      else { head = r; r.text = `${fixed(r.score)} ${r.name}`; }
    }
    return sorted;
  }

  const draw = {};

  draw.history = (d) => {
    const colours = palette(), ink = css("--ink"), soft = css("--soft");
    const steps = (column) => d.generations.filter((g) => g[column] !== null)
      .flatMap((g) => [[g[1], g[column], g[0]], [g[2], g[column], g[0]]]);
    const best = d.points.filter((p) => p[0] === d.best);
    const low = Math.min(...d.points.map((p) => p[1]), ...d.references.map((r) => r.score));
    const high = Math.max(...d.points.map((p) => p[1]), ...d.references.map((r) => r.score), ...d.finalists.map((f) => f[1]));
    const pad = .06 * (high - low || .1);
    const lines = labelled(d.references, .045 * (high - low || .1)).map((r) => {
      const colour = r.origin === "parent" ? soft : colours[1];
      return {
        yAxis: r.score, name: r.name, lineStyle: { color: colour, type: r.origin === "parent" ? [4, 4] : [8, 4], width: 1, opacity: .9 },
        label: { show: r.text !== "", formatter: r.text, position: "end", color: colour, fontSize: 11, width: 185, overflow: "truncate", align: "left" },
      };
    });
    return base({
      tooltip: {
        trigger: "item",
        formatter: (e) => e.data.tip || (e.componentType === "markLine" ? tip(e.data.name, [["search items", fixed(e.data.yAxis)]])
          : tip(e.seriesName, [["generation", String(e.value[2] ?? "")], ["objective", fixed(e.value[1])]])),
      },
      xAxis: axis({ type: "value", name: "candidate, in the order it was tried", min: "dataMin", max: "dataMax", minInterval: 1, splitLine: { show: false } }),
      grid: { left: 8, right: 195, top: 34, bottom: 26, containLabel: true },
      yAxis: axis({ type: "value", scale: true, min: low - pad, max: high + pad, axisLabel: { ...scoreLabel, showMinLabel: false, showMaxLabel: false } }),
      legend: { data: ["candidates", "dropped by a race", "best of a generation", "median", "finalist", "the best"].filter((n) =>
        (n !== "dropped by a race" || d.points.some((p) => p[3])) && (n !== "finalist" || d.finalists.length)) },
      dataZoom: [{ type: "inside", filterMode: "none" }],
      series: [
        { name: "candidates", type: "scatter", symbolSize: d.points.length > 1500 ? 3 : 5, itemStyle: { color: colours[0], opacity: .3 },
          data: d.points.filter((p) => !p[3]).map((p) => [p[0], p[1], p[2]]), progressive: 0,
          markLine: { symbol: "none", silent: false, data: lines } },
        { name: "dropped by a race", type: "scatter", symbolSize: 3, itemStyle: { color: soft, opacity: .35 },
          data: d.points.filter((p) => p[3]).map((p) => [p[0], p[1], p[2]]) },
        { name: "best of a generation", type: "line", showSymbol: false, lineStyle: { width: 2, color: colours[0] }, itemStyle: { color: colours[0] }, data: steps(3) },
        { name: "median", type: "line", showSymbol: false, lineStyle: { width: 1.5, color: ink, opacity: .65 }, itemStyle: { color: ink }, data: steps(4) },
        { name: "finalist", type: "scatter", symbol: "diamond", symbolSize: 11, itemStyle: { color: colours[1] },
          data: d.finalists.map((f) => ({ value: f, tip: tip(f[2] || `#${f[0]}`, [["objective", fixed(f[1])]]) })) },
        { name: "the best", type: "scatter", symbol: "circle", symbolSize: 11, z: 9, itemStyle: { color: "transparent", borderColor: colours[1], borderWidth: 2.5 },
          data: [...best.map((p) => [p[0], p[1], p[2]]), ...d.finalists.filter((f) => f[0] === d.best).map((f) => [f[0], f[1]])] },
      ],
    });
  };

  draw.beliefs = (d, element) => {
    const last = d.generations.length - 1;
    const place = Math.min(kept.get("beliefs") ?? last, last);
    const range = slider(element, "beliefs", last, place, (i) => `generation ${d.generations[i]}`);
    range.oninput = () => {
      kept.set("beliefs", Number(range.value) === last ? undefined : Number(range.value));
      show("beliefs", data.get("beliefs"));
    };
    const there = d.rows.map((_, r) => r).filter((r) => d.values[place][r][0] !== null), rows = there.map((r) => d.rows[r]);
    element.style.height = `${Math.max(200, 22 * rows.length + 70)}px`;
    const ink = css("--ink"), strong = d.low + .5 * (d.high - d.low), paper = isDark() ? "#12151b" : "#ffffff";
    const cells = there.map((r) => d.values[place][r]).flatMap((row, r) => row.map((value, c) => ({
      value: [c, r, value], label: { color: value > strong ? paper : ink },
    })));
    return base({
      tooltip: { formatter: (e) => tip(rows[e.value[1]], [[d.models[e.value[0]], fixed(e.value[2])]]) },
      grid: { left: 8, right: 70, top: 26, bottom: 4, containLabel: true },
      legend: { show: false },
      xAxis: axis({ type: "category", data: d.models, position: "top", splitLine: { show: false }, axisLine: { show: false }, axisLabel: { color: css("--ink"), fontSize: 12.5 } }),
      yAxis: axis({ type: "category", data: rows, inverse: true, splitLine: { show: false }, axisLine: { show: false }, axisLabel: { interval: 0, fontSize: 11.5 } }),
      visualMap: { min: d.low, max: d.high, calculable: false, orient: "vertical", right: 4, top: 26, itemHeight: 110, itemWidth: 10, precision: 2,
        inRange: { color: ramp() }, textStyle: { color: css("--soft"), fontSize: 11 }, text: [fixed(d.high, 2), fixed(d.low, 2)] },
      series: [{ type: "heatmap", data: cells, itemStyle: { borderColor: css("--card"), borderWidth: 2, borderRadius: 3 },
        label: { show: d.models.length <= 8, fontSize: 11, formatter: (e) => fixed(e.value[2], 2) },
        emphasis: { itemStyle: { borderColor: css("--accent") } } }],
    });
  };

  draw.tasks = (d, element) => {
    const colours = palette(), soft = css("--soft"), rows = d.tasks.length;
    element.style.height = `${Math.max(180, 44 * rows + 80)}px`;
    const dots = (values, name) => values.map((v, i) => v === null ? null : ({
      value: [v, i], tip: tip(d.tasks[i], [[name, fixed(v)]]),
    })).filter(Boolean);
    const bars = d.tasks.map((_, i) => d.parent[i] !== null && (d.held_out[i] ?? d.search[i]) !== null
      ? [d.parent[i], d.held_out[i] ?? d.search[i], i] : null).filter(Boolean);
    return base({
      tooltip: { formatter: (e) => e.data.tip || "" },
      grid: { left: 8, right: 20, top: 34, bottom: 26, containLabel: true },
      legend: { data: ["search items", `held out${d.role ? ` (${d.role})` : ""}`, "best parent"].filter((n) => !n.startsWith("held out") || d.role) },
      xAxis: axis({ type: "value", scale: true, axisLabel: scoreLabel, name: "metric", nameGap: 24 }),
      yAxis: axis({ type: "category", data: d.tasks, inverse: true, splitLine: { show: false },
        axisLabel: { color: (name) => d.alarms[d.tasks.indexOf(name)] ? css("--bad") : css("--ink"), formatter: (name) => (d.alarms[d.tasks.indexOf(name)] ? "⚠ " : "") + name } }),
      series: [
        { type: "custom", silent: true, data: bars, encode: { x: [0, 1], y: 2 }, renderItem: (_, api) => {
          const a = api.coord([api.value(0), api.value(2)]), b = api.coord([api.value(1), api.value(2)]);
          const worse = api.value(1) < api.value(0);
          return { type: "line", shape: { x1: a[0], y1: a[1], x2: b[0], y2: b[1] }, style: { stroke: worse ? css("--bad") : css("--good"), lineWidth: 3, opacity: .45 } };
        } },
        { name: "best parent", type: "scatter", symbol: "rect", symbolSize: [3, 20], itemStyle: { color: soft },
          data: d.parent.map((v, i) => v === null ? null : ({ value: [v, i], tip: tip(d.tasks[i], [[`best parent: ${d.parents[i]}`, fixed(v)]]) })).filter(Boolean) },
        { name: "search items", type: "scatter", symbolSize: 11, itemStyle: { color: "transparent", borderColor: colours[0], borderWidth: 2 }, data: dots(d.search, "search items") },
        ...(d.role ? [{ name: `held out (${d.role})`, type: "scatter", symbolSize: 13, itemStyle: { color: colours[0] }, data: dots(d.held_out, `held out (${d.role})`) }] : []),
      ],
    });
  };

  draw.tradeoff = (d, element) => {
    const chosen = kept.get("tradeoff") || [0, 1];
    const box = controls(element, "tradeoff");
    if (!box.childElementCount) {
      ["across", "up"].forEach((name, i) => {
        const label = box.appendChild(document.createElement("label"));
        label.append(`${name} `);
        const select = label.appendChild(document.createElement("select"));
        d.tasks.forEach((task, t) => select.add(new Option(task, String(t), false, t === chosen[i])));
        select.onchange = () => {
          const now = [...(kept.get("tradeoff") || [0, 1])];
          now[i] = Number(select.value);
          kept.set("tradeoff", now);
          show("tradeoff", data.get("tradeoff"));
        };
      });
    }
    const [x, y] = chosen, colours = palette();
    const point = (p) => ({ value: [p[1][x], p[1][y]], tip: tip(p[4] || `#${p[0]}`, [...d.tasks.map((t, i) => [t, fixed(p[1][i])]), ["objective", fixed(p[2])]]), name: p[4] || "" });
    const here = d.points.filter((p) => p[1][x] !== null && p[1][y] !== null);
    const named = { show: true, position: "right", fontSize: 11, color: css("--soft"), formatter: (e) => e.name };
    return base({
      tooltip: { formatter: (e) => e.data.tip },
      xAxis: axis({ type: "value", scale: true, name: d.tasks[x], axisLabel: scoreLabel }),
      yAxis: axis({ type: "value", scale: true, name: d.tasks[y], axisLabel: scoreLabel, nameGap: 44 }),
      grid: { left: 8, right: 60, top: 34, bottom: 26, containLabel: true },
      series: [
        { name: "candidates", type: "scatter", symbolSize: here.length > 1500 ? 3 : 5, itemStyle: { color: colours[0], opacity: .3 }, data: here.filter((p) => p[5] !== "parent" && p[5] !== "hand" && !p[3]).map(point) },
        { name: "hand recipes", type: "scatter", symbol: "triangle", symbolSize: 8, itemStyle: { color: css("--faint"), opacity: .8 }, data: here.filter((p) => p[5] === "hand" && !p[3]).map(point) },
        { name: "Pareto front", type: "scatter", symbolSize: 9, itemStyle: { color: colours[1] }, data: here.filter((p) => p[3] && p[5] !== "parent").map(point) },
        { name: "parents", type: "scatter", symbol: "diamond", symbolSize: 11, itemStyle: { color: css("--ink") }, label: named, data: here.filter((p) => p[5] === "parent").map(point) },
      ],
    });
  };

  draw.routes = (d, element) => {
    const colours = palette(), colour = (model) => colours[d.models.indexOf(model) % colours.length];
    element.style.height = `${Math.max(240, 60 * d.models.length + 90)}px`;
    return base({
      tooltip: { formatter: (e) => e.dataType === "edge"
        ? tip(`layer ${e.data.source.replace(":", ": ")} → ${e.data.target.split(":").slice(1).join(":")}`, [["of the best routes", String(e.value)]])
        : tip(`layer ${e.data.place}`, [[e.data.model, String(e.value)]]) },
      legend: { show: false },
      series: [{ type: "sankey", left: 36, right: 40, top: 24, bottom: 10, nodeAlign: "left", nodeWidth: 9, nodeGap: 14, draggable: false, layoutIterations: 16,
        lineStyle: { color: "gradient", opacity: .38, curveness: .5 },
        label: { show: true, position: "top", distance: 3, fontSize: 10.5, color: css("--soft"), formatter: (e) => e.data.place === 0 || d.nodes.filter((n) => n.place === e.data.place - 1 && n.model === e.data.model).length === 0 ? e.data.model : "" },
        data: d.nodes.map((n) => ({ ...n, itemStyle: { color: colour(n.model), borderWidth: 0 } })), links: d.links }],
    });
  };

  draw.parallel = (d) => {
    const last = d.axes.length - 1, values = d.lines.map((l) => l[last]);
    return base({
      tooltip: { show: false }, legend: { show: false },
      visualMap: { show: false, dimension: last, min: Math.min(...values), max: Math.max(...values), inRange: { color: ramp().slice(isDark() ? 1 : 1) } },
      parallel: { left: 40, right: 60, top: 40, bottom: 24, parallelAxisDefault: {
        nameTextStyle: { color: css("--soft"), fontSize: 12 }, axisLine: { lineStyle: { color: css("--faint") } }, axisTick: { show: false },
        axisLabel: { color: css("--faint"), fontSize: 10.5, formatter: scoreLabel.formatter }, areaSelectStyle: { color: css("--accent"), borderColor: css("--accent"), opacity: .2, width: 18 } } },
      parallelAxis: d.axes.map((name, dim) => ({ dim, name: name.length > 18 ? `${name.slice(0, 17)}…` : name, scale: true, nameLocation: "end" })),
      series: [{ type: "parallel", lineStyle: { width: 1.2, opacity: .45 }, inactiveOpacity: .03, activeOpacity: .8, data: d.lines.map((l) => l.slice(0, -1)).reverse(), smooth: false }],
    });
  };

  draw.timeline = (d, element) => {
    const colours = palette(), kinds = { done: colours[0], failed: css("--bad") };
    element.style.height = `${Math.max(170, 30 * d.workers.length + 110)}px`;
    const colour = (cause) => kinds[cause] || colours[1];
    const clock = (s) => new Date(1000 * (d.start + s)).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
    const ends = d.attempts.map((a) => a[1] + a[2]).sort((a, b) => a - b);
    const last = ends[ends.length - 1] || 1;
    return base({
      tooltip: { formatter: (e) => tip(d.workers[e.value[0]], [[d.causes[e.value[3]], ""], ["from", clock(e.value[1])], ["seconds", e.value[2].toFixed(2)]]) },
      legend: { data: d.causes },
      grid: { left: 8, right: 20, top: 34, bottom: 46, containLabel: true },
      xAxis: axis({ type: "value", min: 0, max: last, axisLabel: { formatter: clock }, splitLine: { show: false } }),
      yAxis: axis({ type: "category", data: d.workers, inverse: true, splitLine: { show: false } }),
      dataZoom: [{ type: "inside", filterMode: "weakFilter", start: last > 300 && d.attempts.length > 400 ? 80 : 0, end: 100 },
        { type: "slider", height: 16, bottom: 8, borderColor: css("--line"), fillerColor: "rgba(100,130,240,.18)", showDetail: false, brushSelect: false, handleSize: 14, filterMode: "weakFilter" }],
      series: d.causes.map((cause, c) => ({
        name: cause, type: "custom", itemStyle: { color: colour(cause) }, encode: { x: [1], y: 0 }, clip: true,
        data: d.attempts.filter((a) => a[3] === c),
        renderItem: (_, api) => {
          const from = api.coord([api.value(1), api.value(0)]), to = api.coord([api.value(1) + api.value(2), api.value(0)]);
          const height = Math.min(18, .62 * api.size([0, 1])[1]);
          return { type: "rect", shape: { x: from[0], y: from[1] - height / 2, width: Math.max(1, to[0] - from[0] - .6), height, r: 2 }, style: { fill: colour(cause), opacity: .8 } };
        },
      })),
    });
  };

  draw.optimizer = (d) => {
    const colours = palette(), ink = css("--ink");
    const pairs = (values) => d.generations.map((g, i) => [g, values[i]]).filter((p) => p[1] !== null);
    const lines = [["spread", d.spread, colours[0], 0], ["movement", d.movement, colours[1], 0], ["s.d. of scores", d.scores, ink, 0], ["loss", d.loss, colours[2], 1]]
      .filter(([, values]) => values.some((v) => v !== null));
    const hasLoss = lines.some(([name]) => name === "loss");
    const positive = lines.filter((l) => !l[3]).flatMap((l) => l[1]).filter((v) => v !== null && v > 0);
    return base({
      tooltip: { trigger: "axis", formatter: (list) => tip(`generation ${list[0].value[0]}`, list.map((e) => [e.seriesName, e.value[1].toPrecision(3)])) },
      legend: { data: lines.map(([name]) => name) },
      xAxis: axis({ type: "value", name: "generation", min: "dataMin", max: "dataMax", minInterval: 1, splitLine: { show: false } }),
      yAxis: [
        axis({ type: "log", show: positive.length > 0, axisLabel: { formatter: (v) => Number(v.toPrecision(2)).toString() } }),
        axis({ type: "value", show: hasLoss, scale: true, position: positive.length ? "right" : "left", splitLine: { show: !positive.length } }),
      ],
      grid: { left: 8, right: 20, top: 34, bottom: 26, containLabel: true },
      series: lines.map(([name, values, color, yAxisIndex]) => ({
        name, type: "line", showSymbol: false, yAxisIndex, lineStyle: { width: 1.8, color }, itemStyle: { color },
        data: pairs(values).filter((p) => yAxisIndex || p[1] > 0),
      })),
    });
  };

  draw.failures = (d, element) => {
    element.style.height = `${Math.max(120, 34 * d.causes.length + 50)}px`;
    return base({
      tooltip: { formatter: (e) => tip(e.name, [["times", String(e.value)]]) }, legend: { show: false },
      grid: { left: 8, right: 50, top: 8, bottom: 8, containLabel: true },
      xAxis: axis({ type: "value", minInterval: 1, splitLine: { show: false }, axisLabel: { show: false } }),
      yAxis: axis({ type: "category", data: d.causes, inverse: true, splitLine: { show: false }, axisLabel: { width: 200, overflow: "truncate" } }),
      series: [{ type: "bar", data: d.counts, barMaxWidth: 16, itemStyle: { color: css("--bad"), opacity: .75, borderRadius: 3 }, label: { show: true, position: "right", color: css("--soft") } }],
    });
  };

  draw.lineage = (d, element) => {
    const columns = new Map();
    for (const node of d.nodes) columns.set(node[4], [...(columns.get(node[4]) || []), node]);
    const tallest = Math.max(...[...columns.values()].map((list) => list.length));
    element.style.height = `${Math.max(150, 30 * tallest + 70)}px`;
    const scores = d.nodes.map((n) => n[3]).filter((s) => s !== null), shades = ramp().slice(1);
    const low = Math.min(...scores), high = Math.max(...scores);
    const shade = (s) => s === null ? css("--faint") : shades[high > low ? Math.min(2, Math.floor(2.999 * (s - low) / (high - low))) : 1];
    const places = new Map();
    for (const [step, list] of columns) list.forEach((n, i) => places.set(n[0], [-step, (list.length - 1) / 2 - i]));
    const nodes = d.nodes.map((n) => ({
      value: places.get(n[0]), name: n[1], symbolSize: n[0] === d.root ? 18 : 11,
      itemStyle: { color: n[0] === d.root ? palette()[1] : shade(n[3]) },
      label: { show: n[0] === d.root || tallest < 9, position: "bottom", distance: 5, fontSize: 10.5, color: css("--soft"), formatter: n[1].length > 20 ? `${n[1].slice(0, 19)}…` : n[1] },
      tip: tip(n[1], [["generation", String(n[2])], ["objective", fixed(n[3])]]),
    }));
    const hidden = { type: "value", show: false, scale: false };
    return base({
      tooltip: { formatter: (e) => e.data.tip || "" }, legend: { show: false },
      grid: { left: 60, right: 60, top: 20, bottom: 34 },
      xAxis: { ...hidden, min: -Math.max(...columns.keys()), max: 0 },
      yAxis: { ...hidden, min: -tallest / 2, max: tallest / 2 },
      series: [
        { type: "lines", coordinateSystem: "cartesian2d", silent: true, lineStyle: { color: css("--faint"), opacity: .4, width: 1, curveness: .06 },
          data: d.links.map(([child, parent]) => ({ coords: [places.get(parent), places.get(child)] })) },
        { type: "scatter", data: nodes, z: 3 },
      ],
    });
  };

  draw.pair = (d, element) => {
    if (!d.tasks) return null;
    element.style.height = `${Math.max(140, 34 * d.tasks.length + 80)}px`;
    const rows = d.tasks.map((task, i) => [d.differences[i], i, d.halves[i]]).filter((r) => r[0] !== null);
    const reach = Math.max(...rows.map((r) => Math.abs(r[0]) + (r[2] || 0)), .01) * 1.15;
    const colour = (r) => r[2] !== null && Math.abs(r[0]) <= r[2] ? css("--faint") : r[0] > 0 ? css("--good") : css("--bad");
    return base({
      tooltip: { formatter: (e) => tip(d.tasks[e.value[1]], [["difference", `${signed(e.value[0])} ± ${fixed(e.value[2])}`]]) }, legend: { show: false },
      grid: { left: 8, right: 20, top: 10, bottom: 30, containLabel: true },
      xAxis: axis({ type: "value", min: -reach, max: reach, name: `← ${d.names[1]} better      ${d.names[0]} better →`, axisLabel: { showMinLabel: false, showMaxLabel: false, formatter: (v) => signed(v).replace(/0+$/, "").replace(/\.$/, "") } }),
      yAxis: axis({ type: "category", data: d.tasks, inverse: true, splitLine: { show: false }, axisLabel: { color: css("--ink") } }),
      series: [{ type: "custom", data: rows, encode: { x: 0, y: 1 }, renderItem: (_, api) => {
        const row = [api.value(0), api.value(1), api.value(2)], at = api.coord([row[0], row[1]]), fill = colour(row);
        const half = Number.isFinite(row[2]) ? row[2] : 0, a = api.coord([row[0] - half, row[1]]), b = api.coord([row[0] + half, row[1]]);
        return { type: "group", children: [
          { type: "line", shape: { x1: a[0], y1: at[1], x2: b[0], y2: at[1] }, style: { stroke: fill, lineWidth: 3, opacity: .55 } },
          { type: "circle", shape: { cx: at[0], cy: at[1], r: 5.5 }, style: { fill } } ] };
      }, markLine: { symbol: "none", silent: true, label: { show: false }, lineStyle: { color: css("--faint"), type: "solid", width: 1 }, data: [{ xAxis: 0 }] } }],
    });
  };

  function controls(element, id) {
    let box = element.previousElementSibling;
    if (!box || !box.classList.contains("controls")) {
      box = document.createElement("div");
      box.className = "controls";
      element.before(box);
    }
    return box;
  }

  function slider(element, id, last, place, name) {
    const box = controls(element, id);
    if (!box.childElementCount) {
      const label = box.appendChild(document.createElement("label"));
      label.append("generation ");
      const range = label.appendChild(document.createElement("input"));
      Object.assign(range, { type: "range", min: "0", step: "1" });
      box.appendChild(document.createElement("output"));
    }
    const range = box.querySelector("input");
    range.max = String(last);
    range.value = String(place);
    range.setAttribute("aria-valuetext", name(place));
    box.querySelector("output").textContent = name(place);
    return range;
  }

  // Draws a panel's chart anew from its data; a panel without data is hidden.
  function show(id, chart) {
    const element = document.getElementById(`${id}-chart`);
    if (!element || !draw[id]) return;
    data.set(id, chart);
    element.hidden = !chart;
    if (!chart) return;
    const option = draw[id](chart, element);
    element.hidden = !option;
    if (!option) return;
    let drawn = charts.get(id);
    if (!drawn) {
      drawn = echarts.init(element, null, { renderer: "canvas" });
      charts.set(id, drawn);
      new ResizeObserver(() => drawn.resize()).observe(element);
    }
    drawn.resize();
    drawn.setOption(option, { notMerge: true });
  }

  function again() {
    for (const [id, chart] of data) show(id, chart);
  }

  return { show, again, data };
})();
