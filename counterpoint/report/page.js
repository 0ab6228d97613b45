"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const one = (selector, root = document) => root.querySelector(selector);
  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const integer = value => Math.round(value).toLocaleString("en-GB");
  const short = value => {
    const size = Math.abs(value);
    if (size !== 0 && size < 1e-3) return value.toExponential(2).replaceAll("-", "−");
    return (size >= 1000 ? integer(value) : value.toPrecision(3)).replace("-", "−");
  };
  const nearestIndex = (list, value) => list.reduce((best, v, i) => (Math.abs(v - value) < Math.abs(list[best] - value) ? i : best), 0);

  /* The value under the pointer; arrow keys move it. */
  function readings(figure, chart) {
    const marks = [];
    let at = chart.step.length - 1;
    for (const area of all("[data-plot]", figure)) {
      const plot = chart.plots[area.dataset.plot];
      const cross = make("i", { class: "cross", hidden: "" }), spot = make("i", { class: "spot", hidden: "" });
      const text = make("span", { class: "reading", hidden: "" });
      area.append(cross, spot, text);
      marks.push({ plot, cross, spot, text });
      area.addEventListener("pointermove", event => {
        const box = area.getBoundingClientRect();
        show(nearestIndex(chart.step, chart.x[0] + ((event.clientX - box.left) / box.width) * (chart.x[1] - chart.x[0])));
      });
      area.addEventListener("pointerleave", () => document.activeElement !== area && hide());
      area.addEventListener("blur", hide);
      area.addEventListener("focus", () => area.matches(":focus-visible") && show(at));
      area.addEventListener("keydown", event => {
        const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: 10, PageDown: -10 }[event.key];
        if (!move) return;
        event.preventDefault();
        show(clamp(at + move, 0, chart.step.length - 1));
      });
    }
    function show(index) {
      at = index;
      const across = (chart.step[at] - chart.x[0]) / (chart.x[1] - chart.x[0]);
      marks.forEach(({ plot, cross, spot, text }, k) => {
        const up = (plot.values[at] - plot.y[0]) / (plot.y[1] - plot.y[0]);
        for (const mark of [cross, spot, text]) mark.hidden = false;
        cross.style.left = spot.style.left = `${across * 100}%`;
        spot.style.bottom = `${clamp(up, 0, 1) * 100}%`;
        const said = [plot, ...(plot.also ?? [])].map(s => `${s.name} ${short(s.values[at])}`).join(" · ");
        text.textContent = `${k ? "" : `step ${integer(chart.step[at])} · `}${said}`;
        text.style.left = across < 0.6 ? `calc(${across * 100}% + 8px)` : "auto";
        text.style.right = across < 0.6 ? "auto" : `calc(${(1 - across) * 100}% + 8px)`;
      });
    }
    function hide() {
      for (const { cross, spot, text } of marks) cross.hidden = spot.hidden = text.hidden = true;
    }
  }

  /* One step's two distributions, beside the heat map. */
  function similarity(figure, chart) {
    const area = one("[data-plot]", figure), slider = one("[data-slider]", figure), title = one(".side .title.x", figure);
    const cross = make("i", { class: "cross" });
    area.append(cross);
    const ridge = shares => {
      const size = 1000 / shares.length;
      return `M0,1000${shares.map((s, k) => `H${(Math.min(s / chart.top, 1) * 960).toFixed(1)}V${(1000 - (k + 1) * size).toFixed(1)}`).join("")}H0Z`;
    };
    const show = index => {
      slider.value = index;
      const step = integer(chart.step[index]);
      slider.setAttribute("aria-valuetext", `step ${step}`);
      title.textContent = `step ${step}`;
      cross.style.left = `${((chart.step[index] - chart.x[0]) / (chart.x[1] - chart.x[0])) * 100}%`;
      for (const path of all("[data-side]", figure)) path.setAttribute("d", ridge(chart[path.dataset.side][index]));
    };
    slider.addEventListener("input", () => show(+slider.value));
    area.removeAttribute("tabindex");
    area.addEventListener("pointermove", event => {
      const box = area.getBoundingClientRect();
      show(nearestIndex(chart.step, chart.x[0] + ((event.clientX - box.left) / box.width) * (chart.x[1] - chart.x[0])));
    });
    show(chart.step.length - 1);
  }

  for (const figure of all("figure[data-chart]")) {
    const chart = data.charts[figure.dataset.chart];
    if (chart) (figure.dataset.chart === "similarity" ? similarity : readings)(figure, chart);
  }

  const copy = one("[data-copy]");
  if (copy) {
    copy.addEventListener("click", async () => {
      const code = one("[data-command]");
      try {
        await navigator.clipboard.writeText(code.textContent);
        copy.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(code);
        copy.textContent = "selected";
      }
      setTimeout(() => (copy.textContent = "copy"), 1600);
    });
  }

  /* Images, vectors, map, neighbours. */
  const set = data.gallery;
  if (!set) return;
  const bytes = Uint8Array.from(atob(set.vector), c => c.charCodeAt(0));
  const coded = new Int8Array(bytes.buffer);
  const vectors = new Float32Array(coded.length);
  for (let i = 0; i < set.count; i++) {
    let length = 0;
    for (let d = i * set.size; d < (i + 1) * set.size; d++) length += coded[d] * coded[d];
    length = Math.sqrt(length) || 1;
    for (let d = i * set.size; d < (i + 1) * set.size; d++) vectors[d] = coded[d] / length;
  }
  function neighbours(query, most = 8) {
    const found = [];
    for (let i = 0; i < set.count; i++) {
      if (i === query) continue;
      let cosine = 0;
      for (let d = 0; d < set.size; d++) cosine += vectors[query * set.size + d] * vectors[i * set.size + d];
      found.push({ index: i, cosine });
    }
    return found.sort((a, b) => b.cosine - a.cosine).slice(0, most);
  }
  const className = index => (set.label ? set.classes[set.label[index]] : "");
  const breakable = name => name.split(/(?<=[/_])/).flatMap(part => [part, make("wbr")]);
  const same = (a, b) => Boolean(set.label) && set.label[a] === set.label[b];
  const sprite = new Image();
  const corner = index => [(index % set.columns) * set.side, Math.floor(index / set.columns) * set.side];

  function tile(index, { cosine = null, query = null, big = false, onClick = null, canvasSize = 0 } = {}) {
    const canvas = make("canvas", { "aria-hidden": "true" });
    const size = canvasSize || set.side;
    canvas.width = canvas.height = size;
    const pen = canvas.getContext("2d");
    pen.imageSmoothingEnabled = false;
    pen.drawImage(sprite, ...corner(index), set.side, set.side, 0, 0, size, size);
    const kind = `tile${big ? " big" : ""}${set.side < 40 ? " crisp" : ""}${query !== null && same(index, query) ? " same" : ""}`;
    const words = [`image ${index}`, className(index), cosine === null ? "" : `cosine ${cosine.toFixed(2)}`].filter(Boolean).join(", ");
    const node = onClick ? make("button", { type: "button", class: kind, "aria-label": words, title: className(index) || `image ${index}` }) : make("div", { class: kind, role: "img", "aria-label": words });
    node.append(canvas);
    if (cosine !== null) node.append(make("span", { "aria-hidden": "true" }, cosine.toFixed(2).replace("-", "−")));
    if (onClick) node.addEventListener("click", () => onClick(index));
    return node;
  }

  sprite.addEventListener("load", () => {
    const map = one("#map") && drawMap();
    if (one("#neighbours")) drawRows(map);
  });
  sprite.src = set.sprite;

  function drawRows() {
    const rows = one("[data-rows]");
    const row = query => {
      const node = make("div", { class: "row" });
      const fill = (index, focus) => {
        const near = neighbours(index);
        const equal = near.filter(n => same(n.index, index)).length;
        const about = make("div", {}, ...breakable(className(index) || `image ${index}`));
        if (set.label) about.append(make("small", {}, `${equal} of ${near.length} share its class`));
        node.replaceChildren(
          make("div", { class: "query" }, tile(index), about),
          make("div", { class: "near" }, ...near.map(n => tile(n.index, { cosine: n.cosine, query: index, onClick: i => fill(i, true) }))),
        );
        if (focus) one("button", node).focus({ preventScroll: true });
      };
      fill(query, false);
      return node;
    };
    const fresh = queries => rows.replaceChildren(...queries.map(row));
    fresh(set.queries);
    one("[data-others]").addEventListener("click", () => {
      const chosen = new Set();
      while (chosen.size < Math.min(set.queries.length, set.count)) chosen.add(Math.floor(Math.random() * set.count));
      fresh([...chosen]);
    });
  }

  function drawMap() {
    const stage = one(".stage"), canvas = one("canvas", stage), pen = canvas.getContext("2d"), card = one("[data-card]"), legend = one("[data-legend]");
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const light12 = ["#1f6fb4", "#c65d00", "#0b8a68", "#b0528f", "#8a7400", "#3aa0d8", "#7a4fb0", "#8f5547", "#cf2f52", "#5b8c1f", "#4a545f", "#0e9b9b"];
    const dark12 = ["#5fb0ee", "#f59a3e", "#3fc79d", "#e598c9", "#d8bf3f", "#9bd6f8", "#b99bea", "#cf9f92", "#f77c93", "#a3d05c", "#b8c1ca", "#4fd3d3"];
    const many = set.groups.length;
    const colours = () => set.groups.map((_, g) =>
      many <= 12 ? (dark.matches ? dark12 : light12)[g] : `hsl(${(g * 137.508) % 360} ${dark.matches ? "62% 68%" : "58% 43%"})`);
    let palette = colours(), style = getComputedStyle(document.documentElement);
    let view = { zoom: 1, x: 0, y: 0 }, wide = 0, high = 0, draw = "dots", hovered = -1, held = -1, only = -1, queued = false, near = [];
    let tinted = null;
    const colour = name => style.getPropertyValue(name).trim();
    const groupOf = i => (set.group ? set.group[i] : -1);
    const shade = i => (set.group && many > 1 ? palette[set.group[i]] : colour("--ink"));
    const base = () => 0.9 * Math.min(wide / Math.max(set.extent[0], 0.1), high / Math.max(set.extent[1], 0.1));
    const screen = i => [wide / 2 + (set.place[i][0] - view.x) * base() * view.zoom, high / 2 + (set.place[i][1] - view.y) * base() * view.zoom];

    /* Figures on a plain ground are cut out and drawn in the colour of their class. */
    function tint() {
      if (set.paper === null) return sprite;
      const sheet = make("canvas");
      sheet.width = sprite.naturalWidth; sheet.height = sprite.naturalHeight;
      const ink = sheet.getContext("2d", { willReadFrequently: true });
      ink.drawImage(sprite, 0, 0);
      const pixels = ink.getImageData(0, 0, sheet.width, sheet.height);
      const probe = make("canvas").getContext("2d");
      const rgb = Array.from({ length: set.count }, (_, i) => shade(i)).map(c => {
        probe.fillStyle = c;
        const hex = probe.fillStyle;
        return [1, 3, 5].map(k => parseInt(hex.slice(k, k + 2), 16));
      });
      for (let y = 0; y < sheet.height; y++) for (let x = 0; x < sheet.width; x++) {
        const k = (y * sheet.width + x) * 4;
        const i = Math.floor(y / set.side) * set.columns + Math.floor(x / set.side);
        if (i >= set.count) { pixels.data[k + 3] = 0; continue; }
        pixels.data[k + 3] = Math.abs(pixels.data[k] - set.paper);
        [pixels.data[k], pixels.data[k + 1], pixels.data[k + 2]] = rgb[i];
      }
      ink.putImageData(pixels, 0, 0);
      return sheet;
    }

    const side = () => clamp(22 * Math.pow(view.zoom, 0.75) * Math.sqrt(600 / Math.max(set.count, 150)) * Math.sqrt(base() / 500), 12, 96);

    function paint() {
      queued = false;
      const ratio = devicePixelRatio || 1;
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
      pen.clearRect(0, 0, wide, high);
      const size = side(), radius = clamp(2.6 * Math.pow(view.zoom, 0.4) * Math.sqrt(700 / Math.max(set.count, 200)) + 0.6, 2.2, 7);
      const chosen = held >= 0 ? held : hovered;
      const order = [...Array(set.count).keys()];
      if (only >= 0) order.sort((a, b) => (groupOf(a) === only) - (groupOf(b) === only));
      for (const i of order) {
        const [x, y] = screen(i);
        if (x < -size || y < -size || x > wide + size || y > high + size) continue;
        pen.globalAlpha = only >= 0 && groupOf(i) !== only ? 0.1 : 0.9;
        if (draw === "dots") {
          pen.fillStyle = shade(i);
          pen.beginPath(); pen.arc(x, y, radius, 0, 7); pen.fill();
        } else {
          pen.drawImage(tinted, ...corner(i), set.side, set.side, x - size / 2, y - size / 2, size, size);
          if (set.paper === null && many > 1) {
            pen.strokeStyle = shade(i); pen.lineWidth = 1.5;
            pen.strokeRect(x - size / 2, y - size / 2, size, size);
          }
        }
      }
      pen.globalAlpha = 1;
      if (chosen < 0) return;
      const [cx, cy] = screen(chosen);
      pen.strokeStyle = colour("--ink"); pen.lineWidth = 1;
      for (const n of near) {
        const [x, y] = screen(n.index);
        pen.globalAlpha = 0.45;
        pen.beginPath(); pen.moveTo(cx, cy); pen.lineTo(x, y); pen.stroke();
      }
      pen.globalAlpha = 1;
      const ring = draw === "dots" ? radius + 3.5 : size / 2 + 3;
      pen.lineWidth = 2;
      pen.beginPath(); pen.arc(cx, cy, ring, 0, 7); pen.stroke();
    }
    const repaint = () => { if (!queued) { queued = true; requestAnimationFrame(paint); } };

    function describe(index) {
      if (index < 0) return;
      near = neighbours(index);
      const title = className(index) || `image ${index}`;
      const about = make("div", { class: "about" }, make("h3", {}, ...breakable(title)));
      about.append(make("p", {}, set.label ? `image ${index} · ${near.filter(n => same(n.index, index)).length} of ${near.length} neighbours share its class` : "and its nearest neighbours"));
      about.append(make("div", { class: "near" }, ...near.map(n => tile(n.index, { cosine: n.cosine, query: index, onClick: hold }))));
      card.replaceChildren(tile(index, { big: true, canvasSize: set.side < 40 ? set.side * 8 : set.side * 4 }), about);
    }
    function hover(index) {
      if (index === hovered) return;
      hovered = index;
      if (held < 0 && index >= 0) describe(index);
      canvas.style.cursor = index >= 0 ? "pointer" : "";
      repaint();
    }
    function hold(index) {
      held = index;
      describe(index >= 0 ? index : hovered);
      if (index >= 0) {
        const [x, y] = screen(index);
        if (x < 0 || y < 0 || x > wide || y > high) [view.x, view.y] = set.place[index];
      }
      repaint();
    }
    function under(x, y) {
      let best = -1, least = Math.max(12, draw === "images" ? side() / 2 : 0) ** 2;
      for (let i = 0; i < set.count; i++) {
        if (only >= 0 && groupOf(i) !== only) continue;
        const [px, py] = screen(i), far = (px - x) ** 2 + (py - y) ** 2;
        if (far < least) { least = far; best = i; }
      }
      return best;
    }
    function zoom(factor, x = wide / 2, y = high / 2) {
      if (!factor) view = { zoom: 1, x: 0, y: 0 };
      else {
        const next = clamp(view.zoom * factor, 1, 40);
        const dx = (x - wide / 2) / base(), dy = (y - high / 2) / base();
        view.x += dx / view.zoom - dx / next;
        view.y += dy / view.zoom - dy / next;
        view.zoom = next;
        if (next === 1) view.x = view.y = 0;
      }
      repaint();
    }
    const local = event => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };

    /* Whoever only scrolls past the map is not caught by it: the wheel zooms once the pointer has moved over the map. */
    let meant = false, moved = 0;
    const fingers = new Map();
    addEventListener("scroll", () => (meant = false), { passive: true });
    canvas.addEventListener("wheel", event => {
      if (!(meant || event.ctrlKey || document.activeElement === canvas) || (view.zoom === 1 && event.deltaY > 0)) return;
      event.preventDefault();
      zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.04 : 0.0016)), ...local(event));
    }, { passive: false });
    canvas.addEventListener("pointerdown", event => {
      fingers.set(event.pointerId, local(event));
      moved = 0;
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", event => {
      meant = true;
      const [x, y] = local(event), before = fingers.get(event.pointerId);
      if (!before) return hover(under(x, y));
      if (fingers.size === 2) {
        const [other] = [...fingers].filter(([id]) => id !== event.pointerId).map(([, p]) => p);
        const was = Math.hypot(before[0] - other[0], before[1] - other[1]), is = Math.hypot(x - other[0], y - other[1]);
        zoom(is / Math.max(was, 1), (x + other[0]) / 2, (y + other[1]) / 2);
        moved = 9;
      } else {
        moved += Math.hypot(x - before[0], y - before[1]);
        if (moved > 4) {
          canvas.classList.add("held");
          view.x -= (x - before[0]) / (base() * view.zoom);
          view.y -= (y - before[1]) / (base() * view.zoom);
          repaint();
        }
      }
      fingers.set(event.pointerId, [x, y]);
    });
    const up = event => {
      const [x, y] = local(event);
      if (fingers.delete(event.pointerId) && moved <= 4 && event.type === "pointerup") hold(under(x, y));
      canvas.classList.remove("held");
    };
    canvas.addEventListener("pointerup", up);
    canvas.addEventListener("pointercancel", up);
    canvas.addEventListener("pointerleave", () => hover(-1));
    canvas.addEventListener("dblclick", event => zoom(2, ...local(event)));
    canvas.addEventListener("keydown", event => {
      const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (event.key === "+" || event.key === "=") zoom(1.5);
      else if (event.key === "-") zoom(1 / 1.5);
      else if (event.key === "0") zoom(0);
      else if (event.key === "Escape") hold(-1);
      else if (way) {
        const from = held >= 0 ? held : set.queries[0], [x, y] = screen(from);
        let best = -1, least = Infinity;
        for (let i = 0; i < set.count; i++) {
          const [px, py] = screen(i), along = (px - x) * way[0] + (py - y) * way[1], off = Math.abs((px - x) * way[1]) + Math.abs((py - y) * way[0]);
          if (i !== from && along > 0.5 && along + 2.5 * off < least) { least = along + 2.5 * off; best = i; }
        }
        hold(held < 0 ? from : best >= 0 ? best : from);
      } else return;
      event.preventDefault();
    });
    const show = name => {
      draw = name;
      for (const other of all("[data-draw]", stage)) other.setAttribute("aria-pressed", other.dataset.draw === draw);
      repaint();
    };
    for (const button of all("[data-draw]", stage)) button.addEventListener("click", () => show(button.dataset.draw));
    for (const button of all("[data-zoom]", stage)) button.addEventListener("click", () => zoom(+button.dataset.zoom));

    function explain() {
      if (many < 2) return legend.remove();
      const counts = set.groups.map((_, g) => set.group.filter(v => v === g).length);
      legend.replaceChildren(...set.groups.map((name, g) => {
        const swatch = make("i"); swatch.style.background = palette[g];
        const button = make("button", { type: "button", "aria-pressed": "false" }, swatch, name, make("small", {}, String(counts[g])));
        const press = () => { for (const other of all("button", legend)) other.setAttribute("aria-pressed", other === button && kept === g); };
        button.addEventListener("pointerenter", () => { only = g; repaint(); });
        button.addEventListener("pointerleave", () => { only = kept; repaint(); });
        button.addEventListener("click", () => { kept = kept === g ? -1 : g; only = kept; press(); repaint(); });
        return button;
      }));
    }
    let kept = -1;
    function theme() {
      style = getComputedStyle(document.documentElement);
      palette = colours();
      tinted = tint();
      explain();
      repaint();
    }
    dark.addEventListener("change", theme);
    new ResizeObserver(() => {
      wide = stage.clientWidth; high = stage.clientHeight;
      canvas.width = wide * (devicePixelRatio || 1); canvas.height = high * (devicePixelRatio || 1);
      paint();
    }).observe(stage);
    theme();
    describe(set.queries[0]);
    near = [];
    if (set.paper !== null || set.count <= 400 || many < 2) show("images");
  }
})();
