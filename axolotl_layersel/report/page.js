"use strict";
// Moves the cut: slider -> numbers, sentence, charts. The page is complete without it, for the plan's own cut.
const plan = JSON.parse(document.getElementById("plan").textContent);
const slider = document.getElementById("first");
const reset = document.getElementById("reset");
const ratio = (value) => (value % 0.5 === 0.125 ? value - 1e-9 : value).toFixed(2); // ties to even, as in the log

function layers(first) {
  const last = plan.layers - 1;
  return first === last ? `layer ${last}` : `layers ${first} to ${last}`;
}

function amount(curve, value) {
  if (!curve.whole) return "";
  const whole = curve.whole * value;
  const most = curve.units.length - 1;
  const power = whole > 0 ? Math.max(0, Math.min(most, Math.floor(Math.log(whole) / Math.log(curve.base) + 1e-9))) : 0;
  return `${(whole / curve.base ** power).toFixed(1)} ${curve.units[power]}`.trim();
}

function show(first) {
  const told = [];
  for (const tile of document.querySelectorAll(".tile[data-curve]")) {
    const curve = plan.curves[tile.dataset.curve];
    tile.querySelector("b").textContent = ratio(curve.values[first]);
    tile.querySelector("rect").setAttribute("width", Math.min(100, 100 * Math.max(0, curve.values[first])));
    tile.querySelector(".amount").textContent = amount(curve, curve.values[first]);
    told.push(`${curve.label} ${ratio(curve.values[first])}`);
  }
  const trained = `${layers(first)} trained (${plan.layers - first} of ${plan.layers})`;
  slider.setAttribute("aria-valuetext", `first trainable layer ${first}`);
  document.getElementById("at").textContent = first;
  document.getElementById("told").textContent = `Cut at ${first}: ${[trained, ...told].join(", ")}.`;
  reset.disabled = first === plan.first;
  for (const layer of document.querySelectorAll("[data-layer]")) {
    const frozen = Number(layer.dataset.layer) < first;
    layer.classList.toggle("frozen", frozen);
    layer.classList.toggle("trained", !frozen);
  }
  for (const cut of document.querySelectorAll(".chart .cut")) {
    const x = Number(cut.dataset.zero) + first * Number(cut.dataset.step);
    const ground = cut.querySelector(".ground");
    ground.setAttribute("width", Math.max(0, x - Number(ground.getAttribute("x"))));
    cut.querySelector(".edge").setAttribute("x1", x);
    cut.querySelector(".edge").setAttribute("x2", x);
    cut.classList.toggle("hidden", first === 0);
    for (const point of cut.parentNode.querySelectorAll(".point")) {
      point.setAttribute("cx", x);
      point.setAttribute("cy", point.dataset.y.split(" ")[first]);
    }
  }
}

slider.addEventListener("input", () => show(Number(slider.value)));
reset.addEventListener("click", () => {
  slider.value = plan.first;
  show(plan.first);
  slider.focus();
});
slider.style.setProperty("--layers", plan.layers);
document.getElementById("control").hidden = false;
show(Number(slider.value)); // a browser may have kept the slider's place over a reload
