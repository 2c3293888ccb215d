// Histograms that follow a threshold (src/sae_stability/book/slider.py).
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".slider").forEach((slider) => {
    const { thresholds, kinds } = JSON.parse(slider.dataset.shares);
    const range = slider.querySelector("input"), told = slider.querySelector("output"), bars = slider.querySelector(".bars");
    const percent = (share) => `${(100 * share).toFixed(0)} %`;
    const panels = Object.entries(kinds).map(([name, shares]) => {
      const panel = document.createElement("div"), title = document.createElement("p");
      title.textContent = name;
      const columns = shares[0].map((_, count) => {
        const column = document.createElement("span"), bar = document.createElement("i"), label = document.createElement("b");
        label.textContent = count;
        column.append(bar, label);
        return column;
      });
      const row = document.createElement("div");
      row.className = "columns";
      row.setAttribute("role", "img");
      row.append(...columns);
      panel.append(title, row);
      bars.append(panel);
      return { name, shares, columns, row };
    });
    const draw = () => {
      const at = Number(range.value);
      const words = panels.map(({ name, shares, columns, row }) => {
        const of = shares[at];
        of.forEach((share, count) => (columns[count].firstChild.style.height = `${100 * share}%`));
        row.setAttribute("aria-label", `${name}: ${of.map((share, count) => `${percent(share)} come back in ${count}`).join(", ")}`);
        return `${name}: ${percent(of[0])} come back in none, ${percent(of[of.length - 1])} in all ${of.length - 1}`;
      });
      range.setAttribute("aria-valuetext", thresholds[at].toFixed(2));
      told.textContent = `${thresholds[at].toFixed(2)}. ${words.join("; ")}.`;
    };
    range.addEventListener("input", draw);
    draw();
  });
});
