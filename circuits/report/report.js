"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const drawn = new Map();
  const wish = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : wish.matches;
  const onDark = new Map(Object.entries(JSON.parse(document.getElementById("on-dark").textContent)));

  const recoloured = (value) => {
    if (typeof value === "string") return onDark.get(value) ?? value;
    if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map(recoloured);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, recoloured(inner)]));
  };

  const plot = (place) => {
    const figure = JSON.parse(document.getElementById("data-" + place.id).textContent);
    const { data, layout } = isDark() ? recoloured(figure) : figure;
    const style = getComputedStyle(root);
    const line = style.getPropertyValue("--line");
    layout.font = Object.assign({}, layout.font, { color: style.getPropertyValue("--soft") });
    layout.uirevision = place.id;  // zoom and hidden curves outlive a change of theme
    for (const key of Object.keys(layout)) if (/^[xy]axis\d*$/.test(key)) layout[key] = Object.assign({}, layout[key], { gridcolor: line, zerolinecolor: line });
    return window.Plotly.react(place, data, layout, { responsive: true, displaylogo: false, displayModeBar: "hover" });
  };
  const draw = (place) => {
    if (!drawn.has(place.id)) drawn.set(place.id, plot(place));
    return drawn.get(place.id);
  };
  const drawIn = (part) => Promise.all(Array.from(part.querySelectorAll(".plot"), draw));

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { draw(entry.target); seen.unobserve(entry.target); }
  }, { rootMargin: "300px" });
  for (const place of document.querySelectorAll(".plot")) seen.observe(place);

  const openTarget = () => {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target instanceof HTMLDetailsElement) { target.open = true; target.scrollIntoView(); }
  };
  window.addEventListener("hashchange", openTarget);
  openTarget();

  window.drawEverything = async () => {
    for (const part of document.querySelectorAll("details")) part.open = true;
    await drawIn(document);
    return drawn.size;
  };
  window.addEventListener("beforeprint", () => { window.drawEverything(); });

  const show = () => {
    button.setAttribute("aria-pressed", String(isDark()));
    for (const id of drawn.keys()) drawn.set(id, plot(document.getElementById(id)));
  };
  wish.addEventListener("change", show);
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; show(); });
  show();

  for (const one of document.querySelectorAll("[data-download]")) {
    one.addEventListener("click", () => {
      const text = document.getElementById(one.dataset.download).value;
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
      link.download = one.dataset.name;
      link.click();
      URL.revokeObjectURL(link.href);
    });
  }
})();
