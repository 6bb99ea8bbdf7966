"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const drawn = new Map();
  const colours = () => root.dataset.theme === "dark"
    ? { font: "#c3c9d3", grid: "rgba(200,205,215,0.16)" } : { font: "#4b5563", grid: "rgba(90,100,115,0.18)" };

  const restyle = (layout) => {
    const { font, grid } = colours();
    layout.font = Object.assign({}, layout.font, { color: font });
    layout.paper_bgcolor = "rgba(0,0,0,0)";
    layout.plot_bgcolor = "rgba(0,0,0,0)";
    for (const key of Object.keys(layout)) if (/^[xy]axis\d*$/.test(key)) layout[key] = Object.assign({}, layout[key], { gridcolor: grid, zerolinecolor: grid });
    return layout;
  };

  const draw = (place) => {
    if (drawn.has(place.id)) return drawn.get(place.id);
    const { data, layout } = JSON.parse(document.getElementById("data-" + place.id).textContent);
    const promise = window.Plotly.newPlot(place, data, restyle(layout), { responsive: true, displaylogo: false, displayModeBar: "hover" });
    drawn.set(place.id, promise);
    return promise;
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

  const setTheme = (theme) => {
    root.dataset.theme = theme;
    button.textContent = theme === "dark" ? "Light" : "Dark";
    button.setAttribute("aria-pressed", String(theme === "dark"));
    for (const id of drawn.keys()) {
      const place = document.getElementById(id);
      if (place.layout) window.Plotly.relayout(place, restyle(Object.assign({}, place.layout)));
    }
  };
  const wish = window.matchMedia("(prefers-color-scheme: dark)");
  wish.addEventListener("change", () => setTheme(wish.matches ? "dark" : "light"));
  button.addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));
  setTheme(wish.matches ? "dark" : "light");

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
