// Reading a chart: the legend shows the values at the pointer, and the last ones when it leaves.
for (const figure of document.querySelectorAll("figure.chart")) {
  const frame = JSON.parse(figure.dataset.frame);
  const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor"), where = figure.querySelector(".step");
  const rows = [...figure.querySelectorAll("li[data-points]")].map((row) => {
    const [steps, values] = JSON.parse(row.dataset.points);
    return { steps, values, shown: row.querySelector("b") };
  });
  const nearest = (steps, step) =>
    steps.reduce((best, _, i) => (Math.abs(steps[i] - step) < Math.abs(steps[best] - step) ? i : best), 0);
  const longest = rows.reduce((best, row) => (row.steps.length > best.length ? row.steps : best), []);

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * frame.width;
    const part = (x - frame.left) / (frame.right - frame.left);
    const step = longest[nearest(longest, part * frame.last_step)];
    const at = frame.left + ((frame.right - frame.left) * step) / frame.last_step;
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    svg.classList.add("pointed");
    where.textContent = `step ${step.toLocaleString("en")}`;
    for (const row of rows) row.shown.textContent = row.values[nearest(row.steps, step)];
  });
  svg.addEventListener("pointerleave", () => {
    svg.classList.remove("pointed");
    where.textContent = "";
    for (const row of rows) row.shown.textContent = row.values.at(-1);
  });
}
