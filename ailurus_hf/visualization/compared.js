// The handle of each slider on the page, also of one that comes later: it follows the pointer and the arrow keys.
"use strict";
(() => {
  const rangeOf = (slider) => slider.querySelector("input[type=range]");
  const sliderOf = (event) => (event.target instanceof Element ? event.target.closest(".compared .slider") : null);
  const show = (slider) => {
    const range = rangeOf(slider);
    slider.style.setProperty("--at", range.value + "%");
    range.setAttribute("aria-valuetext", range.value + " % off, " + (100 - range.value) + " % on");
  };
  const follow = (slider, event) => {
    const box = slider.getBoundingClientRect();
    rangeOf(slider).value = Math.round((100 * (event.clientX - box.left)) / box.width);
    show(slider);
  };
  const on = (name, act) =>
    document.addEventListener(name, (event) => {
      const slider = sliderOf(event);
      if (slider) act(slider, event);
    });
  on("input", show);
  on("pointerdown", (slider, event) => {
    if (event.button !== 0) return;
    slider.setPointerCapture(event.pointerId);
    follow(slider, event);
  });
  on("pointermove", (slider, event) => {
    if (slider.hasPointerCapture(event.pointerId)) follow(slider, event);
  });
  // The pictures are not dragged away, and the arrow keys go on from where the pointer left.
  on("mousedown", (slider, event) => {
    event.preventDefault();
    rangeOf(slider).focus({ preventScroll: true });
  });
})();
