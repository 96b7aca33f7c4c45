"use strict";
// Moves the cut: slider -> numbers, sentence, charts. The page is complete without it, for the plan's own cut.
const plan = JSON.parse(document.getElementById("plan").textContent);
const slider = document.getElementById("first");
const reset = document.getElementById("reset");

function show(first) {
  for (const tile of document.querySelectorAll(".tile")) {
    const name = tile.dataset.curve;
    tile.querySelector("b").textContent = plan.ratios[name][first];
    tile.querySelector("rect").setAttribute("width", Math.min(100, 100 * Math.max(0, plan.curves[name][first])));
    tile.querySelector(".amount").textContent = plan.amounts[name][first];
  }
  slider.setAttribute("aria-valuetext", `first trainable layer ${first}`);
  document.getElementById("at").textContent = first;
  document.getElementById("sentence").textContent = plan.sentences[first];
  reset.disabled = first === plan.first;
  for (const layer of document.querySelectorAll("[data-layer]")) {
    const frozen = Number(layer.dataset.layer) < first;
    layer.classList.toggle("frozen", frozen);
    layer.classList.toggle("trained", !frozen);
  }
  for (const chart of document.querySelectorAll(".chart")) {
    const frame = JSON.parse(chart.dataset.frame);
    const x = frame.zero + first * frame.step;
    const [ground, edge] = [chart.querySelector(".ground"), chart.querySelector(".edge")];
    ground.firstElementChild.setAttribute("d", `M${frame.left} ${frame.bottom}H${x}V${frame.top}H${frame.left}Z`);
    edge.firstElementChild.setAttribute("d", `M${x} ${frame.bottom}V${frame.top}`);
    for (const part of [ground, edge]) part.classList.toggle("hidden", first === 0);
    for (const point of chart.querySelectorAll(".point")) {
      const mark = point.querySelector("use");
      mark.setAttribute("x", x);
      mark.setAttribute("y", frame.base - frame.unit * plan.curves[point.dataset.curve][first]);
    }
  }
}

slider.addEventListener("input", () => show(Number(slider.value)));
reset.addEventListener("click", () => {
  slider.value = plan.first;
  show(plan.first);
  slider.focus();
});
slider.style.setProperty("--layers", plan.sentences.length);
document.getElementById("control").hidden = false;
show(Number(slider.value)); // a browser may have kept the slider's place over a reload
