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

  // A page may be narrow: texts are broken, and margins made, so that nothing is cut off or covers something else.
  const plain = (text) => text.replace(/<[^>]*>/g, "");
  const wrapped = (text, most) => text.split("<br>").map((line) => {
    const lines = [""];
    for (const word of line.split(" ")) {
      const before = lines[lines.length - 1];
      if (before && plain(before + " " + word).length > most) lines.push(word);
      else lines[lines.length - 1] = before ? before + " " + word : word;
    }
    return lines.join("<br>");
  }).join("<br>");
  const TITLE = 8.2, TEXT = 7.4;  // pixels that a letter takes, at most, in titles of figures and of axes
  const share = (axis) => axis.domain ? axis.domain[1] - axis.domain[0] : 1;
  const retitle = (axis, room) => axis.title?.text
    ? Object.assign({}, axis, { title: Object.assign({}, axis.title, { text: wrapped(axis.title.text, Math.floor(room / TEXT)) }) })
    : axis;
  const fit = (layout, width, height) => {
    let columns = 1;
    for (const key of Object.keys(layout)) {
      if (/^xaxis\d*$/.test(key)) columns = Math.max(columns, Math.round(0.9 / share(layout[key])));
      if (/^yaxis\d*$/.test(key)) layout[key] = retitle(layout[key], share(layout[key]) * (height - 200));
    }
    layout.annotations = (layout.annotations ?? []).map((one) => one.yref === "paper" && columns > 1
      ? Object.assign({}, one, { text: wrapped(one.text, Math.floor((width - 150) / columns / 6.6)) }) : one);
    const text = wrapped(layout.title?.text ?? "", Math.floor((width - 16) / TITLE));
    const lines = text.split("<br>").length;
    const above = (layout.annotations ?? []).some((one) => one.yref === "paper" && one.y >= 0.99);
    layout.title = Object.assign({}, layout.title, { text, x: 0, xref: "container", xanchor: "left", y: 1, yref: "container", yanchor: "top", pad: { t: 8 + 15 * (lines - 1), l: 4 } });  // placed by its last line
    layout.margin = Object.assign({}, layout.margin, { t: 26 + 20 * lines + (above ? 20 : 0) });
  };
  const makeRoom = async (place, height) => {
    const titles = {};
    for (const [key, axis] of Object.entries(place.layout)) if (/^xaxis\d*$/.test(key) && axis.title?.text)
      titles[key + ".title.text"] = wrapped(axis.title.text, Math.floor((share(axis) * place._fullLayout._size.w + 24) / TEXT));
    if (Object.keys(titles).length) await window.Plotly.relayout(place, titles);
    const area = place._fullLayout._size;
    const top = place.getBoundingClientRect().top;
    const ends = Array.from(place.querySelectorAll(".xtick text, text[class^=x][class$=title], .annotation"), (one) => one.getBoundingClientRect().bottom - top);
    const below = Math.max(0, ...ends) - area.t - area.h;
    const shown = place.querySelector("g.legend");
    const needed = shown ? shown.getBoundingClientRect().height : 0;
    const grown = height + Math.max(0, needed - 40);
    place.style.height = grown + "px";
    return window.Plotly.relayout(place, { "margin.b": Math.ceil(Math.max(40, below + needed + 16)), height: grown });
  };

  const plot = (place) => {
    const figure = JSON.parse(document.getElementById("data-" + place.id).textContent);
    const { data, layout } = isDark() ? recoloured(figure) : figure;
    const style = getComputedStyle(root);
    const line = style.getPropertyValue("--line");
    layout.font = Object.assign({}, layout.font, { color: style.getPropertyValue("--soft") });
    layout.uirevision = place.id;  // zoom and hidden curves outlive a change of theme
    for (const key of Object.keys(layout)) if (/^[xy]axis\d*$/.test(key)) layout[key] = Object.assign({}, layout[key], { gridcolor: line, zerolinecolor: line });
    const height = layout.height ?? place.clientHeight;
    fit(layout, place.clientWidth, height);
    return window.Plotly.react(place, data, layout, { responsive: true, displaylogo: false, displayModeBar: "hover" })
      .then(() => makeRoom(place, height));
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
  let width = window.innerWidth, waiting;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(show, 200);
  });
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
