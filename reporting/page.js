"use strict";
// What the reader switches, and the table. The figures are in page_figures.js.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const get = (id) => document.getElementById(id);
  const methods = new Map(data.methods.map((method) => [method.id, method]));
  const off = new Set();
  const chosen = new Set();
  // First by what was measured here, not only by others.
  const measured = ({ name, weights }) => data.models.some((model) => model.figures[weights][name]);
  let sorted = { column: data.columns.findIndex(measured), ascending: true };
  let timer = null;

  // What the figures ask: the data, and what of it is switched on.
  const state = {
    data,
    method: (id) => methods.get(id),
    visible: (items) => items.filter((item) => !off.has(item.method)),
    sources: () => [
      ...(get("published").checked ? [{ models: state.visible(data.published), published: true }] : []),
      { models: state.visible(data.models), published: false },
    ],
    byMethod: (models) => data.methods
      .map((method) => [method, models.filter((model) => model.method === method.id)])
      .filter(([, own]) => own.length),
    paths: () => state.visible(data.trajectories)
      .filter((path) => get("published").checked || !path.published),
  };

  function element(tag, text = "", attributes = {}) {
    const made = document.createElement(tag);
    made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  function symbol(method, hollow = false) {
    const shapes = {
      circle: "M6 1.2a4.8 4.8 0 1 0 .01 0z", square: "M1.7 1.7h8.6v8.6H1.7z",
      "triangle-up": "M6 1l5.2 9.4H.8z", diamond: "M6 .6L11.4 6 6 11.4.6 6z",
      "triangle-down": "M6 11L.8 1.6h10.4z",
    };
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    for (const [name, value] of [["width", 12], ["height", 12], ["viewBox", "0 0 12 12"]]) {
      svg.setAttribute(name, value);
    }
    svg.setAttribute("aria-hidden", "true");
    path.setAttribute("d", shapes[method.symbol]);
    path.setAttribute("fill", hollow ? "none" : colourOf(method));
    if (hollow) path.setAttribute("stroke", colourOf(method));
    svg.append(path);
    return svg;
  }

  function options(select, entries) {
    select.replaceChildren(...entries.map(([value, text]) => element("option", text, { value })));
  }

  function draw(id, [traces, shape]) {
    const config = {
      displaylogo: false, responsive: true, displayModeBar: isNarrow() ? false : "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "sendChartToCloud"],
      // Nothing of a report leaves the reader's machine, by no button either.
      showSendToCloud: false, plotlyServerURL: "",
    };
    Plotly.react(get(id), traces, shape, config);
  }

  function drawScatter() {
    const [x, y, weights] = ["x_axis", "y_axis", "weights"].map((id) => get(id).value);
    if (!x || !y) return;
    draw("scatter", scatterFigure(state, x, y, weights));
    const text = data.correlations[weights][`${x} ${y}`];
    get("correlation").textContent = text
      ? `${text}\nIn brackets 95 % intervals, methods resampled; over all models, also those switched off.`
      : "Measured for too few models for a correlation.";
  }

  function drawTrajectories() {
    const progress = Number(get("progress").value);
    get("progress_text").textContent = `${progress} % of training`;
    draw("trajectories", trajectoryFigure(state, progress / 100));
  }

  function drawCurves() {
    const models = state.visible(data.models).filter((model) => chosen.has(model.label));
    draw("losses", curveFigure(state, models, "RLoss"));
    draw("errors", curveFigure(state, models, "RErr"));
  }

  function drawView() {
    const view = data.views[get("view").value];
    if (!view) return;
    draw("view_figure", viewFigure(state, view));
    const notes = {
      arrows: "An arrow points from the last to the early-stopped weights of a model.",
      kink: "Dotted: least-squares lines on both sides of the loss of guessing, over your models that are switched on, where there are three.",
      trend: "Dotted: least-squares line of each sweep of three models or more, which differ in one number of their training alone.",
      diagonal: "Dotted: equal on both.",
    };
    const text = data.correlations.final[`${view.x} ${view.y}`];
    get("view_note").textContent = [notes[view.kind], text].filter(Boolean).join("\n");
  }

  function drawLandscapes() {
    const name = get("landscape").value;
    if (!name) return;
    get("surface_label").hidden = !name.endsWith("surface");
    draw("landscapes", landscapeFigure(state, name, get("surface").value));
  }

  function drawFigures() {
    drawScatter();
    drawTrajectories();
    drawCurves();
    drawView();
    drawLandscapes();
  }

  function drawAll() {
    drawMethods();
    drawChips();
    drawRows();
    drawFigures();
  }

  function drawMethods() {
    for (const [list, trained] of [["method_list", true], ["other_list", false]]) {
      const focused = document.activeElement?.dataset?.method;
      get(list).replaceChildren(...data.methods
        .filter((method) => method.trained === trained)
        .map(methodItem));
      const box = [...get(list).querySelectorAll("input")].find((b) => b.dataset.method === focused);
      if (focused !== undefined) box?.focus();
    }
    get("num_on").textContent = `${data.methods.length - off.size} of ${data.methods.length}`;
  }

  function methodItem(method) {
    const item = element("li"), label = element("label");
    const box = element("input", "", { type: "checkbox" });
    box.checked = !off.has(method.id);
    box.dataset.method = method.id;
    box.addEventListener("change", () => {
      off[box.checked ? "delete" : "add"](method.id);
      drawAll();
    });
    label.append(box, symbol(method, !method.trained), element("span", method.label));
    label.classList.toggle("off", !box.checked);
    item.append(label);
    return item;
  }

  function drawChips() {
    get("curve_models").replaceChildren(...state.visible(data.models)
      .filter((model) => Object.keys(model.curves).length)
      .map((model) => {
        const chip = element("button", model.label, { type: "button" });
        chip.style.setProperty("--chip", colourOf(state.method(model.method)));
        chip.setAttribute("aria-pressed", chosen.has(model.label));
        chip.addEventListener("click", () => {
          chosen[chosen.has(model.label) ? "delete" : "add"](model.label);
          chip.setAttribute("aria-pressed", chosen.has(model.label));
          drawCurves();
        });
        return chip;
      }));
  }

  const cellOf = (model, column) => model.figures[column.weights][column.name];

  // A dash comes last, whichever way the column is sorted.
  function compare(a, b) {
    const sign = sorted.ascending ? 1 : -1;
    if (sorted.column < 0) return sign * a.label.localeCompare(b.label, "en", { numeric: true });
    const [x, y] = [a, b].map((model) => cellOf(model, data.columns[sorted.column])?.[0]);
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    return sign * (x - y);
  }

  function drawHead() {
    const labels = ["Model", ...data.columns.map(headOf)];
    get("head").replaceChildren(...labels.map((label, index) => {
      const cell = element("th", "", { scope: "col" });
      const button = element("button", label, { type: "button" });
      if (sorted.column === index - 1) {
        cell.setAttribute("aria-sort", sorted.ascending ? "ascending" : "descending");
      }
      button.addEventListener("click", () => {
        const again = sorted.column === index - 1;
        sorted = { column: index - 1, ascending: again ? !sorted.ascending : true };
        drawHead();
        drawRows();
        get("head").children[index].firstChild.focus();
      });
      cell.append(button);
      return cell;
    }));
  }

  const headOf = ({ label, name }) => label + (data.names[name].unit && ",\u00a0%");

  function drawRows() {
    // Published figures are of other data, so they stand below and not among one's own.
    const rows = state.sources().reverse().flatMap(({ models, published }) =>
      models.map((model) => ({ ...model, published })).sort(compare));
    get("rows").replaceChildren(...rows.map(rowOf));
  }

  function rowOf(model) {
    const row = element("tr"), first = element("td");
    row.classList.toggle("published", model.published);
    const whole = element("div", "", { class: "model" }), name = element("span", model.label);
    if (model.published) name.append(element("small", "published (CIFAR-10)"));
    if (model.settings) name.append(element("small", model.settings, { class: "settings" }));
    if (model.num_seeds > 1) name.append(element("small", `${model.num_seeds} seeds`));
    whole.append(symbol(state.method(model.method), model.published), name);
    first.append(whole);
    row.append(first, ...data.columns.map((column) => cell(model, column)));
    return row;
  }

  function cell(model, column) {
    const [mean, deviation] = cellOf(model, column) ?? [];
    const { unit } = data.names[column.name];
    const made = element("td", mean === undefined ? "–" : format(mean, unit));
    if (deviation !== undefined) made.append(element("small", `± ${format(deviation, unit)}`));
    if (mean !== undefined && !model.published && column.limits) {
      made.classList.toggle("good", mean < column.limits[0]);
      made.classList.toggle("poor", mean >= column.limits[1]);
    }
    return made;
  }

  function play() {
    const stop = () => {
      clearInterval(timer);
      timer = null;
      get("play").textContent = "▶";
      get("play").setAttribute("aria-label", "Play");
    };
    if (timer !== null) return stop();
    const slider = get("progress");
    if (Number(slider.value) >= 100) slider.value = 0;
    get("play").textContent = "❚❚";
    get("play").setAttribute("aria-label", "Pause");
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      drawTrajectories();
      if (Number(slider.value) >= 100) stop();
    }, 70);
  }

  function fill() {
    const labels = (names) => names.map((name) => [name, data.names[name].label]);
    options(get("x_axis"), labels(data.x));
    options(get("y_axis"), labels(data.y));
    options(get("view"), data.views.map((view, index) => [index, view.title]));
    options(get("landscape"), Object.keys(data.landscapes).map((name) => [name, landscapeName(name)]));
    const surfaces = Object.entries(data.landscapes).filter(([name]) => name.endsWith("surface"));
    const owners = new Set(surfaces.flatMap(([, drawn]) => drawn.map((one) => one.label)));
    options(get("surface"), [...owners].map((label) => [label, label]));
    get("published_label").hidden = !data.published.length && !data.trajectories.some((p) => p.published);
    for (const note of document.querySelectorAll(".published_note")) note.hidden = !data.published.length;
    get("other_methods").hidden = data.methods.every((method) => method.trained);
    get("relation").hidden = !data.x.length || !data.y.length;
    get("paths").hidden = !data.trajectories.length;
    get("curves").hidden = data.models.every((model) => !Object.keys(model.curves).length);
    get("relations").hidden = !data.views.length;
    get("landscape_section").hidden = !Object.keys(data.landscapes).length;
    get("left_out").hidden = !data.left_out.length;
    fillTexts();
  }

  function landscapeName(name) {
    const [weights, kind] = name.split("/");
    const kinds = {
      random: "random directions", adversarial: "adversarial directions",
      hessian: "the Hessian's first eigenvector", surface: "a plane",
    };
    const whose = { final: "last weights", early_stopped: "early-stopped weights" };
    return `${kinds[kind] ?? kind}, ${whose[weights] ?? weights}`;
  }

  function fillTexts() {
    get("left_out_list").replaceChildren(...data.left_out.map(({ folder, reason }) =>
      element("li", `${folder}: ${reason}`)));
    get("unmeasured").textContent = data.unmeasured.length
      ? `Not measured in your runs: ${data.unmeasured.join("; ")}.` : "";
    get("table_caption").textContent = "Mean over seeds" +
      (data.models.some((model) => model.num_seeds > 1) ? " ± standard deviation" : "") +
      "; a dash is what was not measured. A click on a column sorts." +
      (data.published.length ? " Published figures are of CIFAR-10 and stand below your own." : "") +
      (data.columns.some((column) => column.limits)
        ? " Green and bold are the best 30 % of your models by test RErr, orange the worst 30 %, as the paper groups them." : "");
    get("guessing_note").textContent = data.guessing
      .map((loss) => `Dotted: the loss of guessing (${loss.toFixed(2)}).`).join(" ");
  }

  function choose() {
    const labels = data.models.filter((m) => Object.keys(m.curves).length);
    const first = labels.filter((m) => m.method === "at" || m.method === "at_awp");
    for (const model of (first.length ? first : labels).slice(0, 2)) chosen.add(model.label);
  }

  function listen() {
    for (const id of ["x_axis", "y_axis", "weights"]) get(id).addEventListener("change", drawScatter);
    get("progress").addEventListener("input", drawTrajectories);
    get("play").addEventListener("click", play);
    get("view").addEventListener("change", drawView);
    for (const id of ["landscape", "surface"]) get(id).addEventListener("change", drawLandscapes);
    get("published").addEventListener("change", drawAll);
    get("all_on").addEventListener("click", () => { off.clear(); drawAll(); });
    get("all_off").addEventListener("click", () => {
      data.methods.forEach((method) => off.add(method.id));
      drawAll();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
    matchMedia("(max-width: 699px)").addEventListener("change", drawFigures);
  }

  fill();
  choose();
  listen();
  if (isNarrow()) get("methods").open = false;
  drawHead();
  drawAll();
})();
