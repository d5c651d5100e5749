/* The explorer's page: draws what Python sends, and sends the user's actions. Computes nothing.

Traits (Python -> page): options, settings, chain, projection, effect, continuation, ranking, status, ack.
Page -> Python: `commands`, a list of all {client, id, name, ...} that are not acknowledged in `ack` yet.
Names: set {values}, expression {values}, choose {positions}, select {what, cursor}, continue, rank, stop.

All text from models is set as textContent. Stable data-testid attributes, for tests:
  ls-explorer (data-theme, data-ready)  ls-error  ls-trace  ls-behavior  ls-channel  ls-operator
  ls-layer  ls-layer-value  ls-curve    ls-coefficient  ls-coefficient-number  ls-unit  ls-mark (data-value)
  ls-select-all -none -invert -sentence -behavior -thinking -sentence_starts -onsets
  ls-expression  ls-expression-error  ls-count  ls-legend  ls-total  ls-strip (data-kl, data-change)  ls-info
  ls-view       what is in sight of the chain, on the strip
  ls-chain      the listbox; ls-token (data-i; aria-selected; data-label) its options; ls-bar (data-group) on it
  ls-tag (data-of) before a sentence: chooses it
  ls-cut-here  ls-cut  ls-max-tokens  ls-temperature  ls-seed  ls-continue  ls-stop  ls-progress
  ls-unsteered  ls-steered (data-running, data-stale); ls-piece (data-label) in them
  ls-measure  ls-rank  ls-ranking (data-stale)  ls-rank-item (data-group)  ls-code
*/

const SVG = "http://www.w3.org/2000/svg";
const SELECTIONS = {
  all: "all", none: "none", invert: "invert", sentence: "sentence", behavior: "this behavior",
  thinking: "thinking", sentence_starts: "sentence starts", onsets: "onsets",
};
const MEASURES = { kl: "total KL of the chain", log_prob: "log-prob of this behavior's first tokens" };
const CHANNELS = { residual: "residual stream", cache: "KV cache" };
const STRIP = 72; // height of the strip's viewBox
const LONG = 300; // tokens: from there on the chain scrolls in a taller box

const links = new WeakMap(); // one connection to Python per model, shared by all its views

function lineTo(model) {
  if (!links.has(model)) {
    const client = Math.random().toString(36).slice(2);
    let pending = [], id = 0;
    model.on("change:ack", () => {
      const done = model.get("ack")[client] || 0;
      pending = pending.filter((command) => command.id > done);
    });
    const send = (name, fields) => {
      pending = [...pending, { client, id: ++id, name, ...fields }];
      model.set("commands", pending);
      model.save_changes();
    };
    links.set(model, { send, answered: () => pending.length === 0 });
  }
  return links.get(model);
}

function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "test") node.dataset.testid = `ls-${value}`;
    else if (name === "text") node.textContent = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child));
  return node;
}

function svg(tag, attributes = {}) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function fill(select, values, names = {}) {
  select.replaceChildren(...values.map((value, i) => h("option", { value, text: names[value] ?? names[i] ?? value })));
}

function number(x, digits = 3) {
  if (x === null || x === undefined) return "–";
  return x !== 0 && Math.abs(x) < 10 ** -digits ? x.toExponential(1) : x.toFixed(digits);
}

const signed = (x) => (x > 0 ? "+" : "") + number(x);
// A paragraph's end breaks the line once, however many line breaks it has: a long chain has no empty lines.
const shown = (text, next = "") => (text === "" ? "·" : text.replace(/\n+/g, (breaks, at) =>
  "↵".repeat(breaks.length) + (at + breaks.length === text.length && next.startsWith("\n") ? "" : "\n")));
const spoken = (text) => text.replace(/\n/g, " line break ");

function theme() {
  const { body, documentElement: html } = document;
  const light = body.dataset.jpThemeLight ?? html.dataset.jpThemeLight; // JupyterLab
  if (light !== undefined) return light === "true" ? "light" : "dark";
  const words = [body.className, html.className, body.dataset.vscodeThemeKind, body.dataset.theme, html.dataset.theme,
    html.getAttribute("theme")].join(" "); // VS Code, marimo, Colab
  if (/\b(vscode-)?(dark|high-contrast)\b(?!-light)/.test(words)) return "dark";
  if (/\b(vscode-)?light\b/.test(words)) return "light";
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

function render({ model, el }) {
  const { send, answered } = lineTo(model);
  const undo = []; // cleanup for when the view is removed
  const of = (name) => model.get(name);
  const on = (names, draw) => {
    for (const name of names) {
      model.on(`change:${name}`, draw);
      undo.push(() => model.off(`change:${name}`, draw));
    }
    draw();
  };
  const root = h("div", { class: "ls-explorer", test: "explorer" });
  root.addEventListener("keydown", (event) => event.stopPropagation()); // notebooks have their own key bindings

  // Settings: sent when they differ from what Python has, or from what was last sent.
  let told = {};
  const set = (values, name = "set") => {
    const fresh = Object.entries(values).filter(([key, value]) => (key in told ? told[key] : of("settings")[key]) !== value);
    if (!fresh.length && name === "set") return;
    told = { ...told, ...values };
    send(name, { values });
  };
  let later = null; // what a slider or a growing selection will send: at most once per interval
  const now = () => {
    if (!later) return;
    const { timer, action } = later;
    clearTimeout(timer);
    later = null;
    action();
    drawSettings();
  };
  const soon = (action, wait = 80) => {
    if (later?.action.name !== action.name) now();
    later = { timer: later?.timer ?? setTimeout(now, wait), action };
  };
  undo.push(() => clearTimeout(later?.timer));
  const typing = new Set(); // fields with unsent input: messages from Python do not overwrite it
  for (const [kind, does] of [["input", "add"], ["change", "delete"], ["focusout", "delete"]]) {
    root.addEventListener(kind, (event) => typing[does](event.target), true);
  }
  const show = (node, value) => { if (!typing.has(node)) node.value = value; };

  const select = (test, label, field, convert = String) => h("select", {
    test, "aria-label": label, onchange: (event) => set({ [field]: convert(event.target.value) }),
  });
  const field = (test, label, name, attributes) => h("input", {
    test, type: "number", "aria-label": label, ...attributes,
    onchange: (event) => {
      const value = event.target.valueAsNumber;
      if (Number.isFinite(value)) set({ [name]: value });
      else event.target.value = of("settings")[name];
    },
  });
  const button = (test, text, action, attributes = {}) => h("button", { test, type: "button", text, onclick: action, ...attributes });
  const labeled = (text, ...nodes) => h("label", { class: "ls-labeled" }, h("span", { text }), ...nodes);

  const error = h("p", { test: "error", class: "ls-error", role: "alert", hidden: true });
  const trace = select("trace", "chain", "trace", Number);
  const behavior = select("behavior", "behavior", "behavior");
  const channel = select("channel", "what is edited", "channel");
  const operator = select("operator", "operator", "operator");

  // Layer, with the scores in the background
  const curve = svg("svg", { class: "ls-curve", "data-testid": "ls-curve", viewBox: "0 0 100 30", preserveAspectRatio: "none", role: "img" });
  const layer = h("input", {
    test: "layer", type: "range", min: 0, step: 1, "aria-label": "layer",
    oninput: () => { nameLayer(); soon(sendLayer); },
    onchange: now,
  });
  const sendLayer = () => set({ layer: of("options").layers[layer.valueAsNumber] });
  const layerValue = h("output", { test: "layer-value" });
  const nameLayer = () => {
    const value = of("options").layers[layer.valueAsNumber];
    const scores = of("options").curves[behavior.value];
    const score = scores?.mean[of("options").curve_layers.indexOf(value)];
    const site = of("options").site[behavior.value];
    layerValue.textContent = `${value}${score === undefined ? "" : ` · ${number(score)}`}${site === value ? " · selected" : ""}`;
    layer.setAttribute("aria-valuetext", `layer ${layerValue.textContent}`);
  };
  const drawCurve = () => {
    const { curves, curve_layers, curve_name, layers, site } = of("options");
    const scores = curves[of("settings").behavior];
    curve.replaceChildren();
    curve.setAttribute("aria-label", scores ? `${curve_name} by layer` : "no scores given");
    if (!scores) return;
    const at = (i) => (100 * layers.indexOf(curve_layers[i])) / Math.max(layers.length - 1, 1);
    const known = [...curve_layers.keys()].filter((i) => layers.includes(curve_layers[i]) && scores.mean[i] !== null);
    const ends = known.flatMap((i) => [scores.mean[i], scores.low[i], scores.high[i]]).filter((v) => v !== null);
    const bottom = Math.min(0, ...ends), top = Math.max(bottom + 1e-12, ...ends);
    const height = (v) => 28 - (26 * (v - bottom)) / (top - bottom);
    const points = (values, order) => order.map((i) => `${at(i)},${height(values[i] ?? scores.mean[i])}`).join(" ");
    curve.append(svg("polygon", { class: "ls-band", points: `${points(scores.high, known)} ${points(scores.low, [...known].reverse())}` }));
    curve.append(svg("polyline", { class: "ls-line", points: points(scores.mean, known) }));
    const chosen = curve_layers.indexOf(site[of("settings").behavior]);
    if (known.includes(chosen)) curve.append(svg("line", { class: "ls-site", x1: at(chosen), x2: at(chosen), y1: 1, y2: 29 }));
  };

  // Coefficient, with marks
  const strength = () => (of("settings").channel === "cache" ? "c_values" : "coefficient");
  const coefficient = h("input", {
    test: "coefficient", type: "range", "aria-label": "coefficient",
    oninput: () => { exact.value = coefficient.value; soon(sendCoefficient); },
    onchange: now,
  });
  const sendCoefficient = () => set({ [strength()]: coefficient.valueAsNumber });
  const exact = h("input", {
    test: "coefficient-number", type: "number", step: "any", "aria-label": "coefficient, as a number",
    onchange: () => (Number.isFinite(exact.valueAsNumber) ? set({ [strength()]: exact.valueAsNumber }) : drawCoefficient()),
  });
  const marks = h("div", { class: "ls-marks" }), unit = h("small", { test: "unit" });
  const drawCoefficient = () => {
    const settings = of("settings"), cache = settings.channel === "cache", value = settings[strength()];
    const limit = Math.max(cache ? 10 : 4, Math.abs(value)), adds = !cache && settings.operator === "add";
    Object.assign(coefficient, { min: -limit, max: limit, step: cache ? 0.5 : 0.05, value });
    show(exact, value);
    const clamps = settings.operator === "clamp" ? "1 = the projection is as long as the vector" : "1 = removed";
    unit.textContent = adds ? of("options").unit : cache ? "" : clamps;
    const recommended = (of("options").recommended[settings.behavior] || []).flatMap((c) => [c, -c]);
    const values = cache ? [0, 1, 6] : adds ? [0, ...recommended] : [0, 1];
    const mark = (v, text, title, attributes = {}) => Math.abs(v) <= limit && button("mark", text, () => set({ [strength()]: v }), {
      "data-value": v, style: `left: ${50 + (50 * v) / limit}%`, title, ...attributes,
    });
    const { budgets, kl_budget, layers } = of("options"), spends = budgets[settings.behavior]?.[layers.indexOf(settings.layer)];
    const budget = spends && adds ? [spends, -spends] : [];
    marks.replaceChildren(...[
      ...[...new Set(values.map((v) => v + 0))].map((v) => mark(v, `${v}`, !cache && recommended.includes(v) ? "recommended for this behavior" : null)),
      ...budget.map((v) => mark(v, `KL ${kl_budget}`, `${number(v)}: about ${kl_budget} nats per steered token, by the scores of this layer`, { class: "ls-budget" })),
    ].filter((node) => node));
  };

  // Positions
  let cursor = 0, anchor = null, drag = null, tokens = [], chosen = [];
  const count = h("span", { test: "count" });
  const buttons = Object.entries(SELECTIONS).map(([what, text]) => button(`select-${what}`, text, () => send("select", { what, cursor })));
  const expressionError = h("p", { test: "expression-error", class: "ls-error", role: "alert", hidden: true });
  let entered = false; // Enter has sent this text: a change event about it has nothing to add
  const sendExpression = () => set({ expression: expression.value }, "expression");
  const expression = h("input", {
    test: "expression", type: "text", spellcheck: "false", autocomplete: "off", "aria-label": "positions, as an expression",
    placeholder: "thinking & ~sentence_starts | at([5, 6])",
    oninput: () => { entered = false; },
    onchange: () => entered || sendExpression(),
    onkeydown: (event) => {
      if (event.key !== "Enter") return;
      entered = true;
      typing.delete(expression);
      sendExpression();
    },
  });
  const legend = h("div", { test: "legend", class: "ls-legend", role: "list", "aria-label": "behaviors" });
  const chain = h("div", {
    test: "chain", class: "ls-chain", role: "listbox", "aria-multiselectable": "true",
    "aria-label": "chain, token by token: arrows move, page up and down scroll, space chooses, shift and arrows extend, enter chooses the sentence",
  });
  const info = h("p", { test: "info", class: "ls-info" });
  const total = h("p", { test: "total", class: "ls-total", "aria-live": "polite" });
  const strip = svg("svg", { class: "ls-strip", "data-testid": "ls-strip", preserveAspectRatio: "none", role: "img" });
  const map = svg("g"), rug = svg("path", { class: "ls-rug" }), bars = svg("g"); // sentences, chosen positions, numbers
  const view = svg("rect", { class: "ls-view", "data-testid": "ls-view", y: 0, height: STRIP });
  strip.append(view, bars, map, rug);

  const look = (node, label) => {
    const { looks } = of("options");
    if (!looks[label]) return node;
    node.style.setProperty("--c", looks[label].color);
    node.dataset.label = label;
    node.dataset.cue = Object.keys(looks).indexOf(label) % 6;
    return node;
  };
  const describe = (i) => {
    const { texts, labels, prompt_length } = of("chain"), effect = of("effect");
    if (!texts || i >= texts.length) return;
    const t = i - prompt_length, projection = of("projection")[i];
    const parts = [`position ${i}`, JSON.stringify(texts[i]), labels[i] || (t < 0 ? "prompt" : "no label")];
    if (projection !== undefined) parts.push(`projection ${number(projection)} × the mean activation's length`);
    if (t >= 0 && effect.kl) parts.push(`KL ${number(effect.kl[t])} nats`, `log-prob ${signed(effect.change[t])}`);
    info.textContent = parts.join(" · ");
  };
  const moveTo = (i, focus = true, scroll = false) => {
    if (!tokens.length) return;
    tokens[cursor]?.setAttribute("tabindex", "-1");
    cursor = Math.max(0, Math.min(i, tokens.length - 1));
    tokens[cursor].setAttribute("tabindex", "0");
    if (focus) tokens[cursor].focus();
    else if (scroll) chain.scrollTop = tokens[cursor].offsetTop - chain.clientHeight / 3;
    describe(cursor);
  };
  const paint = (wanted) => {
    tokens.forEach((token, i) => {
      if (chosen[i] !== wanted[i]) token.setAttribute("aria-selected", wanted[i] ? "true" : "false");
    });
    chosen = wanted;
  };
  const spread = (base, from, to, value) => base.map((old, i) => (i >= Math.min(from, to) && i <= Math.max(from, to) ? value : old));
  const page = (way) => { // the token that is nearly one box further up or down
    const top = tokens[cursor].offsetTop + way * 0.9 * chain.clientHeight;
    const there = tokens.findIndex((token) => token.offsetTop >= top);
    return there < 0 ? tokens.length - 1 : there;
  };
  const sight = () => { // on the strip, what the chain's box shows
    const { scrollTop, clientHeight, scrollHeight } = chain;
    if (!tokens.length || scrollHeight <= clientHeight + 1) return view.setAttribute("width", 0);
    let from = tokens.findIndex((token) => token.offsetTop + token.offsetHeight > scrollTop);
    let to = tokens.findIndex((token) => token.offsetTop > scrollTop + clientHeight);
    if (from < 0) from = 0;
    if (to < 0) to = tokens.length;
    view.setAttribute("x", from);
    view.setAttribute("width", to - from);
  };
  let asked = 0;
  const lookAgain = () => { cancelAnimationFrame(asked); asked = requestAnimationFrame(sight); };
  const sized = new ResizeObserver(lookAgain);
  sized.observe(chain);
  chain.addEventListener("scroll", lookAgain, { passive: true });
  undo.push(() => { cancelAnimationFrame(asked); sized.disconnect(); });
  const commit = () => {
    const positions = chosen.flatMap((yes, i) => (yes ? [i] : []));
    if (positions.join() !== of("settings").positions.join()) send("choose", { positions });
  };
  const fixed = () => of("settings").channel === "cache"; // the cache vector has a slot of its own
  const tokenOf = (event) => event.target.closest?.("[data-i]");
  const chooseSentence = (i) => {
    now();
    anchor = null;
    moveTo(i);
    if (!fixed()) send("select", { what: "sentence", cursor: i });
  };
  chain.addEventListener("click", (event) => {
    const tag = event.target.closest?.("[data-of]");
    if (tag) chooseSentence(Number(tag.dataset.of));
  });

  chain.addEventListener("pointerdown", (event) => {
    const token = tokenOf(event);
    if (!token || event.button !== 0) return;
    event.preventDefault();
    const i = Number(token.dataset.i), from = event.shiftKey ? cursor : i;
    moveTo(i);
    if (fixed()) return;
    drag = { base: chosen, from, value: event.shiftKey ? true : !chosen[i] };
    paint(spread(drag.base, from, i, drag.value));
  });
  chain.addEventListener("pointerover", (event) => {
    const token = tokenOf(event);
    if (!token) return;
    if (drag) paint(spread(drag.base, drag.from, Number(token.dataset.i), drag.value));
    describe(Number(token.dataset.i));
  });
  chain.addEventListener("focusin", (event) => { if (tokenOf(event)) moveTo(Number(tokenOf(event).dataset.i), false); });
  chain.addEventListener("pointerleave", () => describe(cursor));
  const drop = () => { if (drag) { drag = null; commit(); drawSettings(); } };
  for (const name of ["pointerup", "pointercancel"]) {
    window.addEventListener(name, drop);
    undo.push(() => window.removeEventListener(name, drop));
  }
  chain.addEventListener("keydown", (event) => {
    const { starts } = of("chain");
    const to = {
      ArrowRight: () => cursor + 1, ArrowLeft: () => cursor - 1, Home: () => 0, End: () => tokens.length - 1,
      ArrowDown: () => starts.find((s) => s > cursor) ?? tokens.length - 1,
      ArrowUp: () => starts.findLast((s) => s < cursor) ?? 0,
      PageDown: () => page(1), PageUp: () => page(-1),
    }[event.key];
    if (!tokens.length || event.ctrlKey || event.metaKey || event.altKey) return;
    if (to) {
      event.preventDefault();
      if (event.shiftKey && !fixed()) {
        anchor ??= { at: cursor, base: chosen };
        moveTo(to());
        paint(spread(anchor.base, anchor.at, cursor, true));
        soon(commit);
      } else {
        now();
        anchor = null;
        moveTo(to());
      }
    } else if (event.key === "Enter") {
      event.preventDefault();
      chooseSentence(cursor);
    } else if (event.key === " " && !fixed()) {
      event.preventDefault();
      now();
      anchor = null;
      paint(spread(chosen, cursor, cursor, !chosen[cursor]));
      commit();
    }
  });
  strip.addEventListener("click", (event) => {
    const box = strip.getBoundingClientRect();
    chain.scrollTop = 0; // so that the token comes to the same place from above and from below
    moveTo(Math.floor((tokens.length * (event.clientX - box.left)) / box.width), false, true);
    tokens[cursor]?.focus({ preventScroll: true });
  });

  const drawChain = () => {
    const { texts = [], labels, starts = [], tags, prompt_length } = of("chain");
    const begins = new Set(starts), thinks = new Set(tags), { looks } = of("options");
    const parts = [];
    tokens = texts.map((text, i) => {
      const token = look(h("span", {
        test: "token", class: "ls-token", role: "option", tabindex: "-1", "data-i": i, "aria-selected": "false", text: shown(text, texts[i + 1]),
        "aria-label": `${i}: ${spoken(text)}, ${labels[i] || (i < prompt_length ? "prompt" : "no label")}`,
      }), labels[i]);
      if (i < prompt_length) token.classList.add("ls-prompt");
      if (begins.has(i)) token.classList.add("ls-start");
      if (thinks.has(i)) token.classList.add("ls-think");
      if (i === prompt_length) parts.push(h("span", { class: "ls-rule", role: "presentation" }));
      if (begins.has(i) && labels[i]) parts.push(h("small", { test: "tag", class: "ls-tag", role: "presentation", "aria-hidden": "true", "data-of": i, title: `choose this sentence: ${labels[i]}`, text: looks[labels[i]].tag }));
      parts.push(token);
      return token;
    });
    chosen = texts.map(() => false);
    chain.replaceChildren(...parts);
    chain.classList.toggle("ls-long", texts.length > LONG);
    chain.style.removeProperty("height"); // as the user made it, for another chain
    chain.scrollTop = 0;
    strip.setAttribute("viewBox", `0 0 ${Math.max(texts.length, 1)} ${STRIP}`);
    map.replaceChildren(...starts.flatMap((start, k) => labels[start] ? [svg("rect", {
      x: start, width: (starts[k + 1] ?? texts.length) - start, y: 61, height: 4, fill: looks[labels[start]].color,
    })] : []));
    legend.replaceChildren(...Object.keys(looks).filter((label) => labels?.includes(label)).map((label) =>
      h("span", { role: "listitem" }, look(h("span", { class: "ls-token", text: label }), label), h("small", { class: "ls-tag", text: looks[label].tag }))));
    moveTo(Math.min(prompt_length ?? 0, texts.length - 1), false);
    lookAgain();
  };

  const drawTotal = () => {
    const { kl, total: sum, steering, milliseconds } = of("effect");
    const fresh = kl && steering === of("settings").steering;
    strip.dataset.stale = !fresh;
    if (fresh) total.textContent = `total KL ${number(sum)} nats over ${kl.length} tokens (${Math.round(milliseconds)} ms)`;
    else total.textContent = of("status").error?.where === "live" ? "no result" : "computing…";
  };
  const drawEffect = () => {
    const { kl, change } = of("effect"), { texts = [], prompt_length } = of("chain");
    bars.replaceChildren();
    const known = kl && kl.length === texts.length - prompt_length;
    if (!known) return;
    const most = Math.max(...kl, 1e-9), far = Math.max(...change.map(Math.abs), 1e-9);
    const wide = Math.max(0.9, (1.4 * texts.length) / (strip.getBoundingClientRect().width || 800)).toFixed(2); // 1.4 pixels at least
    const draw = (name, values, base, size) => {
      const d = values.map((v, t) => (v ? `M${prompt_length + t + 0.5} ${base}v${(-v * size).toFixed(2)}` : "")).join("");
      bars.append(svg("path", { class: name, d, "stroke-width": wide }));
    };
    draw("ls-kl", kl, 28, 26 / most);
    draw("ls-up", change.map((v) => Math.max(v, 0)), 44, 14 / far);
    draw("ls-down", change.map((v) => Math.min(v, 0)), 44, 14 / far);
    bars.append(svg("path", { class: "ls-axis", d: `M0 28H${texts.length}M0 44H${texts.length}` }));
    strip.dataset.kl = most;
    strip.dataset.change = far;
    strip.setAttribute("aria-label", `KL (above, up to ${number(most)} nats) and change of each token's log-probability (below, up to ${number(far)})`);
    tokens.forEach((token, i) => {
      const share = i < prompt_length ? 0 : Math.sqrt(kl[i - prompt_length] / most);
      const value = share < 0.02 ? "" : share.toFixed(2);
      if (token.style.getPropertyValue("--k") !== value) token.style.setProperty("--k", value);
    });
    describe(cursor);
  };

  // Continuation
  const cut = field("cut", "position at which the continuation begins", "cut", { step: 1 });
  const cutHere = button("cut-here", "from the cursor", () => set({ cut: Math.max(cursor, of("chain").prompt_length) }));
  const most = field("max-tokens", "maximum number of new tokens", "max_new_tokens", { min: 1, step: 1 });
  const temperature = field("temperature", "temperature", "temperature", { min: 0, step: "any" });
  const seed = field("seed", "seed", "seed", { step: 1 });
  const go = button("continue", "continue", () => { now(); send("continue", {}); }, { class: "ls-main" });
  const stop = button("stop", "stop", () => send("stop", {}));
  const progress = h("progress", { test: "progress", "aria-label": "progress", hidden: true });
  const side = (test, name) => {
    const note = h("small", {}), text = h("div", { test, class: "ls-continuation", tabindex: "0", role: "region", "aria-label": `${name} continuation` });
    return { text, note, node: h("div", {}, h("h4", { text: name }, note), text) };
  };
  const sides = [side("unsteered", "unsteered"), side("steered", "steered")];
  const drawContinuation = () => {
    const { sides: made, note: state } = of("continuation");
    sides.forEach(({ text, note }, i) => {
      const part = made?.[i];
      text.replaceChildren(...(part?.pieces ?? []).map(([label, words]) => look(h("span", { test: "piece", class: "ls-piece", text: words }), label)));
      text.dataset.running = state === "running";
      text.dataset.stale = state === "of earlier settings";
      note.textContent = part ? ` ${[`${part.tokens} tokens`, part.finished && "ended by itself", state].filter(Boolean).join(", ")}` : "";
    });
  };

  // Leave-one-out
  const measure = select("measure", "measure of leaving out", "measure");
  const rank = button("rank", "leave each out", () => { now(); send("rank", {}); });
  const ranking = h("ol", { test: "ranking", class: "ls-ranking", "aria-label": "chosen groups by importance" });
  const drawRanking = () => {
    const { groups = [], full, measure: by, stale } = of("ranking"), { texts = [] } = of("chain");
    for (const bar of chain.querySelectorAll(".ls-bar")) bar.remove();
    const far = Math.max(...groups.map((g) => Math.abs(g.importance)), 1e-12);
    ranking.dataset.stale = Boolean(stale);
    ranking.replaceChildren(...groups.map(({ name, positions, importance }) => {
      const share = Math.abs(importance) / far, alone = positions.length === 1;
      const words = (alone ? texts.slice(Math.max(positions[0] - 7, 0), positions[0] + 1) : positions.map((p) => texts[p])).join("");
      if (!stale && share >= 0.02 && tokens[positions[0]]) { // a smaller one reads as a dash
        const bar = h("span", { test: "bar", class: "ls-bar", role: "presentation", "data-group": name, title: `left out: ${signed(-importance)} nats` });
        bar.style.setProperty("--r", share.toFixed(3));
        bar.dataset.sign = importance < 0 ? "down" : "up";
        tokens[positions[0]].before(bar);
      }
      const item = h("li", { test: "rank-item", "data-group": name },
        h("button", { type: "button", title: "go there", onclick: () => moveTo(positions[0]) },
          h("b", { text: `${signed(importance)} ` }), h("span", { text: `${name} ` }), h("q", { text: alone ? `…${words.slice(-80)}` : words.slice(0, 80) })));
      item.style.setProperty("--r", share.toFixed(3));
      return item;
    }));
    rank.title = full === undefined ? "" : `all of it: ${number(full)} nats (${MEASURES[by]})`;
  };

  const code = h("pre", { test: "code", tabindex: "0" });
  root.append(
    error,
    h("div", { class: "ls-row" }, labeled("chain", trace), labeled("behavior", behavior), labeled("edit", channel), labeled("operator", operator)),
    h("div", { class: "ls-row" },
      h("div", { class: "ls-slider" }, labeled("layer", layerValue), h("div", { class: "ls-over" }, curve, layer)),
      h("div", { class: "ls-slider" }, labeled("coefficient", exact, unit), h("div", { class: "ls-over" }, coefficient, marks))),
    h("div", { class: "ls-row", role: "group", "aria-label": "choose positions" }, ...buttons, count),
    expression, expressionError, legend,
    h("div", { class: "ls-drawn" }, strip, ...["KL, steered ‖ unsteered", "change of log-probability"].map((text) => h("small", { text, "aria-hidden": "true" }))),
    total, chain, info,
    h("div", { class: "ls-row" }, go, stop, labeled("at", cut), cutHere, labeled("max tokens", most), labeled("temperature", temperature), labeled("seed", seed), progress),
    h("div", { class: "ls-continuations" }, ...sides.map(({ node }) => node)),
    h("div", { class: "ls-row" }, rank, labeled("measured by", measure)), ranking,
    h("details", {}, h("summary", { text: "code" }), code),
  );

  on(["options"], () => {
    const { traces, behaviors, operators, channels, measures, layers } = of("options");
    fill(trace, traces.map((_, i) => i), traces.map(({ id, tokens: n }) => `${id} (${n} tokens)`));
    fill(behavior, behaviors);
    fill(operator, operators);
    fill(channel, channels, CHANNELS);
    fill(measure, measures, MEASURES);
    channel.parentElement.hidden = channels.length < 2;
    layer.max = layers.length - 1;
  });
  on(["chain"], () => { drag = anchor = null; drawChain(); });
  const drawSettings = () => {
    if (drag || later || !answered()) return; // the user's input is ahead of Python's state
    const settings = of("settings");
    told = {};
    for (const [node, name] of [[trace, "trace"], [behavior, "behavior"], [channel, "channel"], [operator, "operator"], [measure, "measure"],
      [cut, "cut"], [most, "max_new_tokens"], [temperature, "temperature"], [seed, "seed"]]) show(node, settings[name]);
    if (expressionError.hidden) show(expression, settings.expression);
    show(layer, of("options").layers.indexOf(settings.layer));
    code.textContent = settings.code;
    root.style.setProperty("--behavior", of("options").looks[settings.behavior].color);
    nameLayer();
    drawCurve();
    drawCoefficient();
    const yes = new Set(settings.positions);
    paint(tokens.map((_, i) => yes.has(i)));
    chain.classList.toggle("ls-most", 2 * yes.size > tokens.length);
    rug.setAttribute("d", settings.positions.map((i) => `M${i} 69h1`).join(""));
    tokens.forEach((token, i) => token.classList.toggle("ls-cut", i === settings.cut));
    const off = fixed();
    count.textContent = off ? "the cache vector's own slot is edited" : `${yes.size} of ${tokens.length} positions`;
    for (const node of [...buttons, expression, operator, rank]) node.disabled = off;
    chain.setAttribute("aria-disabled", off);
  };
  on(["settings", "chain", "ack"], drawSettings);
  on(["effect", "projection", "chain"], drawEffect);
  on(["effect", "settings", "status"], drawTotal);
  on(["continuation"], drawContinuation);
  on(["ranking", "chain"], drawRanking);
  on(["status"], () => {
    const { error: wrong, slow, done, of: all } = of("status");
    const here = wrong?.where === "expression";
    expressionError.hidden = !here;
    expressionError.textContent = here ? wrong.message : "";
    expression.setAttribute("aria-invalid", here);
    error.hidden = !wrong || here;
    error.textContent = wrong && !here ? wrong.message : "";
    if (wrong) told = {};
    stop.disabled = !slow;
    progress.hidden = !slow;
    Object.assign(progress, { max: Math.max(all || 1, 1), value: Math.min(done || 0, all || 1) });
    if (!here && answered()) show(expression, of("settings").expression);
  });

  const dress = () => {
    const { page, up, down } = of("options"), kind = theme();
    root.dataset.theme = kind;
    for (const [name, value] of Object.entries({ ...page[kind], up, down })) root.style.setProperty(`--ls-${name}`, value);
  };
  const watch = new MutationObserver(dress), preference = matchMedia("(prefers-color-scheme: dark)");
  for (const node of [document.body, document.documentElement]) watch.observe(node, { attributes: true });
  preference.addEventListener("change", dress);
  undo.push(() => watch.disconnect(), () => preference.removeEventListener("change", dress));
  dress();
  el.append(root);
  root.dataset.ready = "true";
  return () => undo.forEach((step) => step());
}

export default { render };
