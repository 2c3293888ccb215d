// The phase diagram of synthetic worlds, each point with the world behind it (src/sae_stability/book/diagram.py).
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".diagram").forEach((diagram) => {
    const { slices, parameters, found, worlds, defaults } = JSON.parse(diagram.dataset.worlds);
    const slice = diagram.querySelector(".slice"), share = diagram.querySelector(".share");
    const panels = diagram.querySelector(".panels"), shown = diagram.querySelector(".world");
    const add = (parent, tag, text, attributes = {}) => {
      const node = document.createElement(tag);
      if (text !== undefined) node.textContent = text;
      Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value));
      parent.append(node);
      return node;
    };
    const words = (name, value) =>
      value === null ? (name === "active" ? "any" : "–") : typeof value === "boolean" ? (value ? "yes" : "no") : value.toLocaleString("en", { maximumSignificantDigits: 7 });
    const levels = (name, rows) => [...new Set(rows.map((row) => worlds[name][row]))].sort((a, b) => (a ?? Infinity) - (b ?? Infinity));
    const mean = (name, rows) => {
      const known = rows.map((row) => worlds[name][row]).filter((value) => value !== null);
      return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
    };
    const twoDigits = (value) => (value === null ? "–" : value.toFixed(2));

    const look = (rows, cell) => {
      panels.querySelectorAll("[aria-pressed=true]").forEach((other) => other.setAttribute("aria-pressed", false));
      cell.setAttribute("aria-pressed", true);
      shown.replaceChildren();
      add(shown, "h4", `The world behind it, and what ${worlds.seeds[rows[0]]} SAEs find of it`);
      const told = add(shown, "dl");
      Object.entries(parameters).forEach(([name, label]) => {
        add(told, "dt", label);
        add(told, "dd", words(name, worlds[name][rows[0]]));
      });
      const table = add(add(shown, "div"), "table"), head = add(add(table, "thead"), "tr"), body = add(table, "tbody");
      add(head, "th", "share", { scope: "col" });
      rows.forEach((row) => add(head, "th", `draw ${worlds.seed[row]}`, { scope: "col" }));
      Object.entries(found).forEach(([name, label]) => {
        const line = add(body, "tr");
        add(line, "th", label, { scope: "row" });
        rows.forEach((row) => add(line, "td", twoDigits(worlds[name][row])));
      });
      const python = (value) => (value === null ? "None" : value === true ? "True" : value === false ? "False" : value);
      const changed = Object.keys(defaults).filter((name) => name in worlds && worlds[name][rows[0]] !== defaults[name]);
      const given = changed.map((name) => `${name}=${python(worlds[name][rows[0]])}`).join(", ");
      add(add(shown, "p", "Again, from Python: "), "code", `sae_stability.synthetic.measure(World(${given}), seeds=${worlds.seeds[rows[0]]})`);
    };

    const draw = () => {
      const [down, across, apart] = slices[slice.value];
      const here = worlds.slice.flatMap((name, row) => (name === slice.value ? [row] : []));
      panels.replaceChildren();
      shown.replaceChildren();
      (apart ? levels(apart, here) : [undefined]).forEach((panel) => {
        const rows = panel === undefined ? here : here.filter((row) => worlds[apart][row] === panel);
        const table = add(add(panels, "div"), "table"), across_levels = levels(across, rows);
        add(table, "caption", `${panel === undefined ? "" : `${parameters[apart]}: ${words(apart, panel)}. `}Down: ${parameters[down]}. Across: ${parameters[across]}.`);
        const head = add(add(table, "thead"), "tr"), body = add(table, "tbody");
        add(head, "td");
        across_levels.forEach((level) => add(head, "th", words(across, level), { scope: "col" }));
        levels(down, rows).forEach((level) => {
          const line = add(body, "tr");
          add(line, "th", words(down, level), { scope: "row" });
          across_levels.forEach((other) => {
            const behind = rows.filter((row) => worlds[down][row] === level && worlds[across][row] === other);
            const place = add(line, "td");
            if (!behind.length) return;
            const value = mean(share.value, behind);
            const name = `${parameters[down]} ${words(down, level)}, ${parameters[across]} ${words(across, other)}: ${twoDigits(value)}`;
            const cell = add(place, "button", twoDigits(value), { type: "button", "aria-label": name, "aria-pressed": false });
            cell.style.setProperty("--share", `${100 * (value ?? 0)}%`);
            cell.addEventListener("click", () => look(behind, cell));
          });
        });
      });
    };

    Object.keys(slices).filter((name) => worlds.slice.includes(name)).forEach((name) => add(slice, "option", name));
    Object.entries(found).forEach(([name, label]) => add(share, "option", label, { value: name }));
    [slice, share].forEach((select) => select.addEventListener("change", draw));
    draw();
  });
});
