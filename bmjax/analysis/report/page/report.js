"use strict";
(() => {
  const runs = JSON.parse(document.getElementById("data").textContent);
  // Paul Tol's bright scheme, told apart by the colour-blind; further lines differ by their dashes.
  const COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#8a8a8a"];
  const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3]];
  const AT_ONCE = 48;

  function element(tag, name, text) {
    const e = document.createElement(tag);
    if (name) e.className = name;
    if (text !== undefined) e.textContent = text; // text is shown, never read as markup
    return e;
  }

  // Cells behind an entry.
  function cell(run, i, row) {
    const box = element("div", "cell");
    const place = run.places[row];
    if (place !== undefined && place >= 0) {
      const sheet = Math.floor(place / run.sheet), at = place % run.sheet;
      const thumb = element("span", `thumb s${i}-${sheet}`);
      thumb.style.backgroundPosition = `-${(at % run.columns) * run.side}px -${Math.floor(at / run.columns) * run.side}px`;
      thumb.setAttribute("role", "img");
      thumb.setAttribute("aria-label", run.ids[row]);
      box.append(thumb);
    }
    const k = run.classes.length, about = element("div");
    about.append(element("div", "file", run.ids[row]));
    const p = run.probs.slice(row * k, row * k + k);
    const order = [...p.keys()].sort((a, b) => p[b] - p[a]).slice(0, 3);
    if (!order.includes(run.labels[row])) order.push(run.labels[row]);
    for (const c of order) {
      const bar = element("div", c === run.labels[row] ? "bar true" : "bar");
      bar.style.setProperty("--p", `${p[c] / 10}%`);
      bar.append(element("span", "", run.classes[c]), element("span", "", (p[c] / 1000).toFixed(3)));
      about.append(bar);
    }
    box.append(about);
    return box;
  }

  function rowsBehind(run, button) {
    const t = button.dataset.t, p = button.dataset.p, wrong = button.dataset.wrong;
    const rows = [];
    for (let row = 0; row < run.labels.length; row++) {
      if (t !== undefined && run.labels[row] !== +t) continue;
      if (p !== undefined && run.predicted[row] !== +p) continue;
      if (wrong && run.labels[row] === run.predicted[row]) continue;
      rows.push(row);
    }
    const k = run.classes.length, sure = (row) => run.probs[row * k + run.predicted[row]];
    return rows.sort((a, b) => sure(b) - sure(a));
  }

  function show(section, button) {
    const i = +section.dataset.run, run = runs[i], panel = section.querySelector(".behind");
    for (const other of section.querySelectorAll("[aria-pressed]")) other.removeAttribute("aria-pressed");
    button.setAttribute("aria-pressed", "true");
    const rows = rowsBehind(run, button), { t, p, wrong } = button.dataset;
    const name = (c) => run.classes[+c];
    const what = wrong ? (t !== undefined ? `${name(t)}, missed` : `wrongly named ${name(p)}`)
      : t === p ? `${name(t)}, recognised` : `${name(t)}, taken for ${name(p)}`;
    panel.replaceChildren(element("h3", "", `${what}: ${rows.length}`));
    const list = element("div", "found"), more = element("button", "", "more");
    more.type = "button";
    let shown = 0;
    const next = () => {
      for (const row of rows.slice(shown, shown + AT_ONCE)) list.append(cell(run, i, row));
      shown = Math.min(shown + AT_ONCE, rows.length);
      more.hidden = shown >= rows.length;
      more.textContent = `${rows.length - shown} more`;
    };
    more.addEventListener("click", next);
    next();
    panel.append(list, more);
    panel.hidden = false;
  }

  for (const section of document.querySelectorAll(".explorer")) {
    section.addEventListener("click", (event) => {
      const button = event.target.closest("button[data-t], button[data-p]");
      if (button) show(section, button);
    });
    section.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        const pressed = section.querySelector("[aria-pressed]");
        section.querySelector(".behind").hidden = true;
        if (pressed) { pressed.removeAttribute("aria-pressed"); pressed.focus(); }
      }
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      const from = event.target.closest(".matrix button");
      if (!step || !from) return;
      event.preventDefault();
      const to = section.querySelector(
        `.matrix [data-t="${+from.dataset.t + step[0]}"][data-p="${+from.dataset.p + step[1]}"]`);
      if (!to) return;
      from.tabIndex = -1; // one stop of the Tab key for the whole matrix
      to.tabIndex = 0;
      to.focus();
    });
  }

  // Diagrams.
  const plots = new Map(), short = (v) => v == null ? "" : String(+v.toPrecision(3));

  function draw(figure, printed) {
    const one = runs[+figure.dataset.run].charts[figure.dataset.chart][+figure.dataset.place];
    const css = getComputedStyle(document.documentElement);
    const ink = printed ? "#444" : css.getPropertyValue("--soft"), grid = printed ? "#ccc" : css.getPropertyValue("--line");
    const faint = one.faint || [], band = one.band || [];
    const series = [{ label: one.axes[0] }], bands = [];
    one.lines.forEach((line, j) => {
      const colour = band.includes(j) ? "transparent" : faint.includes(j) ? ink : COLOURS[j % COLOURS.length];
      series.push({
        label: line.name, stroke: colour, width: faint.includes(j) ? 1 : 2, spanGaps: true,
        dash: faint.includes(j) ? [4, 4] : DASHES[Math.floor(j / COLOURS.length) % DASHES.length],
        points: { show: Boolean(one.points) && j === 0 || line.y.filter((v) => v !== null).length < 3, size: 7 },
        value: (u, v) => short(v),
      });
    });
    series[0].value = (u, v) => short(v);
    if (band.length) bands.push({ series: [band[1] + 1, band[0] + 1], fill: "rgba(68,119,170,.25)" });
    const axis = (label) => ({ label, labelSize: 18, labelFont: "12px system-ui", font: "11px system-ui", size: 44,
      values: (u, all) => all.map(short), stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 } });
    const range = (bounds) => (u, low, high) => {
      if (bounds && bounds[1] !== null) return [bounds[0], bounds[1]];
      const top = high > 0 ? high * 1.05 : 1;
      return bounds ? [bounds[0], top] : uPlot.rangeNum(low, high, 0.1, true);
    };
    const scales = { x: { time: false }, y: { range: range(one.y) } };
    if (one.xs) scales.x.range = () => one.xs;
    const axes = [axis(one.axes[0]), axis(one.axes[1])];
    axes[1].size = 60;
    if (one.whole) axes[0].incrs = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 100000];
    const width = Math.max(240, figure.clientWidth);
    const old = plots.get(figure);
    if (old) old.destroy();
    const options = { width, height: Math.min(300, Math.max(220, width * 0.7)), series, bands, scales, axes,
      cursor: { drag: { x: false, y: false } }, legend: { live: !printed } };
    const plot = new uPlot(options, [one.x, ...one.lines.map((line) => line.y)], figure);
    const ends = one.lines.filter((_, j) => !band.includes(j) && !faint.includes(j)).map((line) => {
      const known = line.y.filter((v) => v !== null);
      return `${line.name} ends at ${known.length ? known[known.length - 1] : "nothing"}`;
    });
    plot.ctx.canvas.setAttribute("role", "img");
    plot.ctx.canvas.setAttribute("aria-label", `${one.title}: ${ends.join("; ")}`);
    plots.set(figure, plot);
  }

  const figures = [...document.querySelectorAll(".chart")];
  const all = (printed) => figures.forEach((figure) => draw(figure, printed));
  all(false);
  let width = innerWidth, waiting = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // on phones the bar of addresses comes and goes
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(() => all(false), 150);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => all(false));
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
    all(true);
  });
  addEventListener("afterprint", () => all(false));
})();
