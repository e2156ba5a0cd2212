"use strict";
// Shows a run: watchRun asks a server for its status again and again. Whatever it says becomes text nodes only.
function element(name, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "circle"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

function formatNumber(value) {
  if (value == null) return "not finite";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return size && size < 1e-3 ? value.toExponential(1) : String(+value.toPrecision(4));
}

function formatSeconds(seconds) {
  const whole = Math.max(0, Math.round(seconds)), pad = value => String(value).padStart(2, "0");
  const minutes = Math.floor(whole / 60) % 60, hours = Math.floor(whole / 3600);
  return hours ? `${hours}:${pad(minutes)}:${pad(whole % 60)}` : `${minutes}:${pad(whole % 60)}`;
}

// Round numbers from low to high, at most about `most` of them.
function ticks(low, high, most) {
  const power = 10 ** Math.floor(Math.log10((high - low) / most));
  const step = power * [1, 2, 5, 10].find(factor => factor * power * most >= (high - low) * 0.999), found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) found.push(index * step + 0);
  return found;
}

// The mean m = weight * m + (1 - weight) * value, with Adam's correction for its start at 0.
function smoothed(values, weight) {
  let mean = 0, share = 1;
  return values.map(value => {
    if (value == null) return null;
    mean = weight * mean + (1 - weight) * value;
    share *= weight;
    return mean / (1 - share);
  });
}

// A curve chart in the element `box`; draw(chart, weight) draws it anew, as wide as the box is.
function chartIn(box, height) {
  const legend = element("div", { class: "legend" }), place = element("div");
  box.append(legend, place);
  let chart, weight = 0, width = 0;

  function names(step) {
    legend.replaceChildren(...(step == null ? [] : [element("span", {}, `step ${step.toLocaleString("en")}`)]));
    for (const line of chart.lines) {
      const at = step == null ? -1 : line.steps.findLastIndex(each => each <= step);
      const value = at < 0 ? "" : formatNumber(line.values[at]), text = [line.label, value].filter(Boolean).join(" ");
      if (text) legend.append(element("span", { class: line.main ? "first" : "second" }, `${{ "--": "╌ ", ":": "┈ " }[line.dash] ?? "━ "}${text}`));
    }
  }

  function range() {
    const all = chart.lines.flatMap(line => [...line.values, ...line.low, ...line.high]).filter(value => value != null);
    let low = all.length ? all.reduce((a, b) => Math.min(a, b)) : 0, high = all.length ? all.reduce((a, b) => Math.max(a, b)) : 1;
    if (chart.from_zero) [low, high] = [Math.min(0, low), Math.max(0, high)];
    const room = high - low > Math.abs(high) * 1e-6 ? (high - low) * 0.05 : Math.abs(high) * 0.1 || 1;
    return [low === 0 ? 0 : low - room, high === 0 && low < 0 ? 0 : high + room];
  }

  function render() {
    if (!chart || !width) return;
    const [low, high] = range(), first = Math.min(...chart.lines.map(line => line.steps[0]));
    const last = Math.max(first + 1, ...chart.lines.map(line => line.steps.at(-1)));
    const levels = ticks(low, high, 5), left = 12 + 6.5 * Math.max(...levels.map(level => formatNumber(level).length));
    const x = step => left + (step - first) / (last - first) * (width - left - 10);
    const y = value => height - 26 - (value - low) / (high - low) * (height - 36);
    const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${chart.title} over optimizer steps` });
    for (const level of levels) {
      svg.append(element("line", { class: "grid", x1: left, x2: width - 10, y1: y(level), y2: y(level) }),
        element("text", { x: left - 6, y: y(level) + 4, "text-anchor": "end" }, formatNumber(level)));
    }
    for (const step of ticks(first, last, Math.max(2, width / 110)).filter(Number.isInteger)) {
      svg.append(element("text", { x: x(step), y: height - 8, "text-anchor": "middle" }, step.toLocaleString("en")));
    }
    const path = (at, values) => values.map((value, i) => value == null ? "" : `${i && values[i - 1] != null ? "L" : "M"}${x(at[i]).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    for (const line of chart.lines) {
      const color = line.main ? "first" : "second", dash = { "--": "6 4", ":": "2 3" }[line.dash];
      if (line.low.length === line.steps.length && !line.low.includes(null) && !line.high.includes(null)) {
        const back = path([...line.steps].reverse(), [...line.high].reverse()).replace("M", "L");
        svg.append(element("path", { class: `band ${color}`, d: `${path(line.steps, line.low)}${back}Z` }));
      }
      const smooth = line.main && weight > 0 && line.steps.length > 2;
      if (smooth) svg.append(element("path", { class: `faint ${color}`, d: path(line.steps, line.values) }));
      svg.append(element("path", { class: color, d: path(line.steps, smooth ? smoothed(line.values, weight) : line.values), "stroke-dasharray": dash }));
      if (line.steps.length <= 30 && !smooth) line.steps.forEach((step, i) => line.values[i] != null && svg.append(element("circle", { class: color, cx: x(step), cy: y(line.values[i]), r: 3 })));
    }
    const cursor = element("line", { class: "cursor", y1: 10, y2: height - 26, visibility: "hidden" });
    svg.append(cursor);
    svg.addEventListener("pointermove", event => {
      const at = (event.clientX - svg.getBoundingClientRect().left - left) / (width - left - 10);
      const step = Math.round(first + Math.min(1, Math.max(0, at)) * (last - first));
      for (const name of ["x1", "x2"]) cursor.setAttribute(name, x(step));
      cursor.setAttribute("visibility", "visible");
      names(step);
    });
    svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); names(null); });
    place.replaceChildren(svg);
    names(null);
  }

  new ResizeObserver(([entry]) => { width = Math.floor(entry.contentRect.width); render(); }).observe(place);
  return { draw(newChart, newWeight = 0) { [chart, weight] = [newChart, newWeight]; render(); } };
}

// The elements of a run in `root`; show(status) fills them, and leaves alone what has not changed.
function runPanel(root) {
  const part = (name, attributes, ...children) => { const made = element(name, attributes, ...children); root.append(made); return made; };
  root.classList.add("panel");
  const title = part("h1"), base = part("div", { class: "soft" }), message = part("div", { role: "status" });
  const bar = part("div", { class: "progress" }, element("div")), state = part("div", { class: "state soft" });
  const problems = part("div", { class: "bad" }), tiles = part("div", { class: "tiles" });
  const slider = element("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: 0, oninput: () => { chosen = true; lossChart.draw(seen.loss, +slider.value); } });
  const lossTitle = element("figcaption"), loss = part("figure", { class: "card chart" }, lossTitle);
  const lossChart = chartIn(loss, 300), more = part("div", { class: "pair" }), charts = new Map();
  loss.append(element("label", {}, "smoothing ", slider));
  const samples = part("section"), settings = element("pre");
  const configuration = part("details", { class: "card" }, element("summary", {}, "all settings"), settings);
  let seen = {}, chosen = false;

  // Averages a twentieth of the steps, as the report does, until somebody moves the slider.
  function smoothing() {
    const steps = Math.max(...seen.loss.lines.map(line => line.steps.length));
    if (!chosen) slider.value = Math.min(0.9, 1 - 1 / Math.max(1, 0.05 * steps));
    return +slider.value;
  }

  function showCharts(found) {
    for (const [name, one] of charts) if (!found.some(chart => chart.title === name)) { one.figure.remove(); charts.delete(name); }
    for (const chart of found) {
      if (!charts.has(chart.title)) {
        const figure = element("figure", { class: "card chart" }, element("figcaption", {}, chart.title));
        more.append(figure);
        charts.set(chart.title, { figure, drawn: chartIn(figure, 210) });
      }
      charts.get(chart.title).drawn.draw(chart);
    }
  }

  function sampleCard(sample) {
    const card = element("div", { class: "card" }), pair = element("div", { class: "pair" });
    for (const [column, text] of Object.entries(sample.prompt)) card.append(element("div", { class: "soft" }, column), element("div", { class: "row", dir: "auto" }, text));
    for (const [step, text] of sample.replies) pair.append(element("div", {}, element("div", { class: "soft" }, `at step ${step}`), element("div", { class: "row reply", dir: "auto" }, text)));
    card.append(pair);
    return card;
  }

  function age() {
    const left = seen.seconds_left == null ? [] : [`${formatSeconds(seen.seconds_left)} left`];
    const ago = seen.written == null ? [] : [`last record ${formatSeconds(Date.now() / 1000 - seen.written)} ago`];
    const steps = seen.total_steps ? `step ${seen.step.toLocaleString("en")} of ${seen.total_steps.toLocaleString("en")}` : `step ${(seen.step ?? 0).toLocaleString("en")}`;
    state.replaceChildren(...[steps, ...left, ...ago].map(text => element("span", {}, text)));
  }

  return {
    show(status) {
      const changed = name => JSON.stringify(status[name]) !== JSON.stringify(seen[name]), before = seen;
      [title.textContent, base.textContent] = [status.name, status.base ?? ""];
      if (before.message !== status.message) message.textContent = status.message;
      bar.firstChild.style.width = `${status.total_steps ? 100 * Math.min(1, status.step / status.total_steps) : 0}%`;
      bar.firstChild.className = status.state;
      if (changed("problems")) problems.replaceChildren(...status.problems.map(text => element("p", {}, text)));
      if (changed("tiles")) tiles.replaceChildren(...status.tiles.map(([name, value]) => element("div", { class: "card" }, element("span", { class: "soft" }, name), element("b", {}, value))));
      if (changed("samples")) samples.replaceChildren(...(status.samples.length ? [element("h2", {}, "Sample replies, first and latest")] : []), ...status.samples.map(sampleCard));
      if (before.settings !== status.settings) settings.textContent = status.settings;
      [loss.hidden, configuration.hidden] = [!status.loss, !status.settings];
      const redrawn = { loss: changed("loss"), charts: changed("charts") };
      seen = status;
      if (status.loss && redrawn.loss) { lossTitle.textContent = status.loss.title; lossChart.draw(status.loss, smoothing()); }
      if (redrawn.charts) showCharts(status.charts);
      age();
    },
    age,
  };
}

// Shows what `ask()`, which returns a promise of a response, says about a run until the returned function is called.
function watchRun(root, ask, onStatus = () => {}) {
  const panel = runPanel(root), lost = element("p", { class: "bad", role: "alert" });
  root.prepend(lost);
  let timer, ended = false, last = "";
  async function poll() {
    let pause = 2000;
    try {
      const response = await ask();
      if (response.status === 404) { lost.textContent = "This model has no run."; return; }
      if (!response.ok) throw new Error(`the server answered ${response.status}`);
      const text = await response.text(), status = text === last ? null : JSON.parse(text);
      if (ended) return;
      if (status) { panel.show(status); onStatus(status); } else panel.age();
      last = text;
      lost.textContent = "";
    } catch (error) {
      lost.textContent = `No news of the run (${error.message}). The page asks again every few seconds.`;
      pause = 5000;
    }
    if (!ended) timer = setTimeout(poll, document.hidden ? 10000 : pause);
  }
  poll();
  return () => { ended = true; clearTimeout(timer); root.replaceChildren(); };
}
