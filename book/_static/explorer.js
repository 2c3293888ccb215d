// The feature explorer: a list of features that is filtered as one types, and below it what the chosen feature does.
// Its data come as scripts, one piece at a time (src/sae_stability/book/explorer.py writes them): so it works from a disk too.
const explorer = (() => {
  "use strict";
  const waiting = new Map();
  const ALL = "all";
  const BESIDE = 2;  // contexts that are shown of each partner
  let folder, about, table, loaded = [];

  function load(name) {
    const script = make("script", { src: `${folder}/${name}.js` });
    document.head.append(script);
    return script;
  }

  function piece(name) {
    if (!waiting.has(name)) {
      const awaited = {};
      awaited.promise = new Promise((resolve, reject) => {
        awaited.resolve = resolve;
        load(name).onerror = () => reject(new Error(`${name} is missing`));
      });
      waiting.set(name, awaited);
    }
    return waiting.get(name).promise;
  }

  function library() {
    document.head.append(make("link", { rel: "stylesheet", href: `${folder}/datatables.css` }));
    return new Promise((resolve, reject) => Object.assign(load("datatables"), { onload: resolve, onerror: reject }));
  }

  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  const percent = (share) => `${(100 * share).toPrecision(2)} %`;
  const visible = (token) => token.replaceAll("\n", "↵");
  const number = (value) => Number(value).toLocaleString("en");

  // The list.

  function rowsOf(position, columns) {
    return columns.feature.map((feature, row) => {
      const of = Object.fromEntries(Object.entries(columns).map(([name, values]) => [name, values[row]]));
      const words = `${of.token} ${of.explanation ?? ""}`.toLowerCase();
      return { ...of, position, words, key: `${position}-${feature}` };
    });
  }

  async function show(chosen) {
    const positions = chosen === ALL ? about.seeds.map((_, position) => position) : [Number(chosen)];
    loaded = (await Promise.all(positions.map(async (at) => rowsOf(at, await piece(`features-${at}`))))).flat();
    table.clear().rows.add(loaded).draw();
    count();
  }

  function field(label, control) {
    return make("label", {}, `${label} `, control);
  }

  function choice(options, label) {
    const select = make("select");
    options.forEach(([value, text]) => select.append(make("option", { value, textContent: text })));
    return [select, field(label, select)];
  }

  const form = {};

  function filters(columns) {
    const seeds = [...about.seeds.map((seed, position) => [position, `seed ${seed}`]), [ALL, "all seeds"]];
    const any = [["", "any"]];
    let label;
    const labels = [];
    [form.seed, label] = choice(seeds, "SAE");
    labels.push(label);
    [form.band, label] = choice([...any, ...about.bands.map((band, index) => [index, band])], "Band");
    labels.push(label);
    if (columns.trigger) {
      [form.trigger, label] = choice([...any, ...about.triggers.map((name, index) => [index, name])], "Trigger");
      labels.push(label);
    }
    for (const [name, text] of [["least", "Fires on at least (%)"], ["most", "at most (%)"]]) {
      form[name] = make("input", { type: "number", min: 0, max: 100, step: "any", inputMode: "decimal" });
      labels.push(field(text, form[name]));
    }
    form.words = make("input", { type: "search", autocomplete: "off", spellcheck: false });
    labels.push(field("Token or explanation", form.words));
    const group = make("form", { className: "filters" }, ...labels);
    group.addEventListener("submit", (event) => event.preventDefault());
    group.addEventListener("input", (event) => (event.target === form.seed ? show(form.seed.value) : (table.draw(), count())));
    return group;
  }

  function kept(row) {
    const share = 100 * row.frequency;
    return (form.band.value === "" || row.band === Number(form.band.value))
      && (!form.trigger || form.trigger.value === "" || row.trigger === Number(form.trigger.value))
      && (form.least.value === "" || share >= Number(form.least.value))
      && (form.most.value === "" || share <= Number(form.most.value))
      && row.words.includes(form.words.value.toLowerCase());
  }

  function count() {
    form.count.textContent = `${number(table.rows({ search: "applied" }).count())} of ${number(loaded.length)} live features`;
  }

  function columnsOf(columns) {
    const plain = (value, type) => (type === "display" ? make("span", { textContent: visible(value) }) : value);
    const shown = [
      { title: "Feature", data: "feature", render: (value, type, row) => (type === "display" ? link(row.position, value) : value) },
      { title: "Band", data: "band", className: "dt-left", render: (value, type) => (type === "display" ? about.bands[value] : value) },
      { title: `Comes back in, of ${about.trials}`, data: "matches" },
      { title: "Fires on", data: "frequency", render: (value, type) => (type === "display" ? percent(value) : value) },
      { title: "Most on", data: "token", render: plain },
    ];
    if (columns.trigger) {
      shown.push({ title: "Trigger", data: "trigger", className: "dt-left", render: (value, type) => (type === "display" ? about.triggers[value] ?? "" : value) });
    }
    if (columns.impact) shown.push({ title: "Impact (µnat)", data: "impact", render: (value, type) => (type === "display" ? micro(value) : value) });
    return shown;
  }

  const micro = (nats) => number((1e6 * nats).toPrecision(3));

  function link(position, feature, text = null) {
    return make("a", { href: `#feature-${position}-${feature}`, textContent: text ?? `${about.seeds[position]}:${feature}` });
  }

  // A feature.

  async function detail(position, feature) {
    const pieceOf = await piece(`contexts-${position}-${Math.floor(feature / about.piece)}`);
    return pieceOf[feature % about.piece];
  }

  function context(window, strongest) {
    const code = make("code");
    window.tokens.forEach((token, at) => {
      const strength = window.activations[at];
      if (strength <= 0) return code.append(visible(token));
      const mark = make("mark", { textContent: visible(token), title: `activation ${strength}` });
      mark.style.setProperty("--strength", `${Math.round((100 * strength) / strongest)}%`);
      if (at === window.peak) mark.className = "peak";
      code.append(mark);
    });
    return code;
  }

  function histogram(of) {
    const most = Math.max(...of.histogram, 1);
    const total = of.histogram.reduce((sum, height) => sum + height, 0);
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", `0 0 ${of.histogram.length * 10} 60`);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `Histogram of ${total} activations between 0 and ${of.strongest}: ${of.histogram.join(", ")}`);
    of.histogram.forEach((height, at) => {
      const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      const tall = height ? Math.max(1, (60 * height) / most) : 0;
      for (const [name, value] of Object.entries({ x: 10 * at + 1, y: 60 - tall, width: 8, height: tall })) bar.setAttribute(name, value);
      svg.append(bar);
    });
    const caption = `Activations on the ${number(total)} tokens on which it fires, from 0 to ${of.strongest}; the highest bar is ${number(most)} tokens.`;
    return make("figure", {}, svg, make("figcaption", { textContent: caption }));
  }

  function moved(title, tokens) {
    const list = make("ul", { className: "tokens" });
    tokens.forEach(([token, by]) => list.append(make("li", {}, make("code", { textContent: visible(token) || "(empty)" }), ` ${by > 0 ? "+" : ""}${by}`)));
    return make("div", {}, make("h4", { textContent: title }), list);
  }

  function facts(row) {
    const told = [
      ["Comes back in", `${row.matches} of ${about.trials} other SAEs: stability ${(row.matches / about.trials).toFixed(2)}, 95 % interval [${about.low[row.matches]}, ${about.high[row.matches]}]`],
      ["Band", about.bands[row.band]],
      ["Fires on", `${percent(row.frequency)} of the held-out tokens`],
    ];
    if (row.trigger >= 0) told.push(["Trigger", about.triggers[row.trigger]]);
    if (row.explanation) told.push(["Explanation", row.explanation]);
    if (row.impact !== undefined) told.push(["Impact", `${micro(row.impact)} millionths of a nat a token: how much the cross-entropy grows without it`]);
    if (row.group >= 0) told.push(["Group", `number ${row.group} of the groups of unstable features`]);
    const list = make("dl");
    told.forEach(([term, text]) => list.append(make("dt", { textContent: term }), make("dd", { textContent: text })));
    return list;
  }

  async function partner([position, feature, cosine]) {
    const of = await detail(position, feature);
    const same = cosine >= about.threshold - 1e-6;
    const head = make("p", {}, link(position, feature), ` cosine ${cosine.toFixed(2)}, ${same ? "comes back" : "does not come back"}`);
    const shown = of.windows.filter((window) => window.rank).slice(0, BESIDE).map((window) => context(window, of.strongest));
    return make("div", { className: same ? "partner back" : "partner" }, head, ...shown);
  }

  async function open(position, feature) {
    const pane = form.pane, columns = await piece(`features-${position}`);
    const row = rowsOf(position, columns).find((each) => each.feature === feature);
    if (!row) return pane.replaceChildren(make("p", { textContent: `Feature ${feature} of this SAE never fires.` }));
    const of = await detail(position, feature);
    const heading = make("h3", { textContent: `Feature ${feature} of seed ${about.seeds[position]}`, tabIndex: -1 });
    const top = of.windows.filter((window) => window.rank), drawn = of.windows.filter((window) => !window.rank);
    const own = make("div", {}, make("h4", { textContent: "Where it fires most" }), ...top.map((window) => context(window, of.strongest)));
    if (drawn.length) own.append(make("h4", { textContent: "And somewhere, drawn at random" }), ...drawn.map((window) => context(window, of.strongest)));
    const others = make("div", {}, make("h4", { textContent: "The feature most like it in each other SAE" }));
    const parts = [make("div", {}, facts(row), histogram(of))];
    if (of.raised) parts.push(make("div", { className: "moves" }, moved("Makes likelier", of.raised), moved("Makes less likely", of.lowered)));
    pane.replaceChildren(heading, make("div", { className: "columns" }, ...parts), make("div", { className: "columns" }, own, others));
    heading.focus({ preventScroll: true });
    heading.scrollIntoView({ block: "start" });
    const nearest = [...of.partners].sort((one, other) => other[2] - one[2]);
    others.append(...(await Promise.all(nearest.map(partner))));
  }

  function follow() {
    const [, position, feature] = location.hash.match(/^#feature-(\d+)-(\d+)$/) ?? [];
    if (feature !== undefined && about.seeds[position] !== undefined) open(Number(position), Number(feature));
  }

  async function start(root) {
    folder = root.dataset.folder;
    const ready = library();
    about = await piece("about");
    const columns = await piece("features-0");
    const list = make("table", { className: "display compact" });
    form.count = make("p", { role: "status" });
    form.pane = make("section", { className: "feature gallery" });
    form.pane.setAttribute("aria-label", "The chosen feature");
    root.replaceChildren(filters(columns), form.count, make("div", { className: "list", tabIndex: 0 }, list), form.pane);
    root.querySelector(".list").setAttribute("aria-label", "Features");
    root.querySelector(".list").setAttribute("role", "region");
    await ready;
    table = jQuery(list).DataTable({
      data: [],
      columns: columnsOf(columns),
      order: [[2, "desc"], [3, "desc"]],
      pageLength: 10,
      autoWidth: false,
      layout: { topStart: null, topEnd: null, bottomStart: "pageLength", bottomEnd: "paging" },
    });
    table.search.fixed("filters", (text, row) => kept(row));
    await show(0);
    window.addEventListener("hashchange", follow);
    follow();
  }

  document.addEventListener("DOMContentLoaded", () => {
    const root = document.getElementById("explorer");
    if (root) start(root);
  });
  return { take: (name, data) => waiting.get(name).resolve(data) };
})();
