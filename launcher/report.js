// A cursor over each curve, moved by the arrow keys or the mouse. Everything is there without it.
for (const figure of document.querySelectorAll(".figures figure")) {
  const curves = Object.entries(JSON.parse(figure.querySelector("script").textContent));
  const steps = [...new Set(curves.flatMap(([, points]) => points.map(([step]) => step)))].sort((a, b) => a - b);
  const svg = figure.querySelector("svg"), said = figure.querySelector("output");
  const { last, left, right, top, bottom } = svg.dataset;
  const first = steps[0], span = last - first || 1;
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  line.setAttribute("class", "cursor");
  let at = steps.length - 1;

  function draw() {
    const x = +left + (steps[at] - first) / span * (right - left);
    for (const [name, value] of [["x1", x], ["x2", x], ["y1", top], ["y2", bottom]]) line.setAttribute(name, value);
    svg.append(line);
    const values = curves.map(([name, points]) => {
      const seen = points.filter(([step]) => step <= steps[at]);
      const value = seen.length ? seen[seen.length - 1][1] : "-";
      return curves.length > 1 ? `${name} ${value}` : value;
    });
    said.textContent = `step ${steps[at]}  ${values.join("  ")}`;
  }

  figure.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (!move) return;
    event.preventDefault();
    at = Math.max(0, Math.min(steps.length - 1, at + move * (event.shiftKey ? 10 : 1)));
    draw();
  });
  figure.addEventListener("mousemove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const step = first + (x - left) / (right - left) * span;
    at = steps.reduce((best, one, index) => Math.abs(one - step) < Math.abs(steps[best] - step) ? index : best, 0);
    draw();
  });
}
