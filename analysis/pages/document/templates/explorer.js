"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const make = (tag, text, attributes) => Object.assign(document.createElement(tag), { textContent: text ?? "" }, attributes);
  const told = JSON.parse($("data").textContent);
  $("data").remove();

  // ------------------------------------------------------------------ columns

  const bytesOf = (text) => {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    const found = atob(text), bytes = new Uint8Array(found.length);
    for (let i = 0; i < found.length; i += 1) bytes[i] = found.charCodeAt(i);
    return bytes;
  };
  /** A column whose values are decoded when they are asked for first. */
  const read = ({ group, name, words, values }) => {
    let kept = null;
    return {
      group: group === "row" && name === "label" ? name : group, name, words,
      get values() { return (kept ||= new (words ? Int32Array : Float32Array)(bytesOf(values).buffer)); },
    };
  };
  const written = (column, i) => {
    const value = column.values[i];
    if (column.words) return value < 0 ? "–" : column.words[value];
    if (Number.isNaN(value)) return "–";
    return (Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)))).replace("-", "−");
  };
  const columns = told.columns.map(read);
  const ofData = (told.data.columns || []).map(read);
  const every = [...columns, ...ofData];
  const axes = columns.filter((column) => column.group === "coordinates");
  const count = told.count;

  // ------------------------------------------------------------------ colours

  const PALETTE = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#7A4A1E", "#B8A800", "#8A8A8A", "#6A3D9A"];
  const SCALE = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"];
  const MOST_GROUPS = 24, SHADES = 32, NONE = "#9a9a9a";
  const groupColour = (k) => PALETTE[k] || `hsl(${(k * 137.5) % 360} 60% 45%)`;
  const shade = (t) => {
    const at = t * (SCALE.length - 1), k = Math.min(Math.floor(at), SCALE.length - 2), [a, b] = [SCALE[k], SCALE[k + 1]];
    const part = (s, j) => parseInt(s.slice(1 + 2 * j, 3 + 2 * j), 16);
    return `rgb(${[0, 1, 2].map((j) => Math.round(part(a, j) + (at - k) * (part(b, j) - part(a, j)))).join(" ")})`;
  };

  /** Groups of one column: a colour for each, the group of each row (-1: none), and what the legend says. */
  const grouped = (column) => {
    const whole = column.words ? null : [...new Set(column.values)].filter((v) => !Number.isNaN(v)).sort((a, b) => a - b);
    if (column.words || (whole.length <= 12 && whole.every(Number.isInteger))) {
      const words = column.words || whole.map((v) => String(v).replace("-", "−"));
      const order = [...words.keys()];
      if (column.words) order.sort((a, b) => words[a].localeCompare(words[b], "en", { numeric: true }));
      const place = new Map(order.map((k, i) => [column.words ? k : whole[k], i]));
      const groups = Array.from(column.values, (v) => place.get(v) ?? -1);
      return { colours: order.map((_, i) => groupColour(i)), names: order.map((k) => words[k]), groups };
    }
    const sorted = Float32Array.from(column.values).filter((v) => !Number.isNaN(v)).sort();
    const [low, high] = [0.01, 0.99].map((q) => sorted[Math.round(q * (sorted.length - 1))]);
    const of = (v) => Math.max(0, Math.min(SHADES - 1, Math.floor(((v - low) / (high - low || 1)) * SHADES)));
    const groups = Array.from(column.values, (v) => (Number.isNaN(v) ? -1 : of(v)));
    return { colours: [...Array(SHADES).keys()].map((k) => shade(k / (SHADES - 1))), low, high, groups };
  };

  // ------------------------------------------------------------------ data, and decoded means

  const sheets = new Map();
  const sheet = (uri) => {
    if (!sheets.has(uri)) {
      const image = new Image();
      sheets.set(uri, new Promise((done) => { image.onload = () => done(image); image.src = uri; }));
    }
    return sheets.get(uri);
  };
  const draw = async (canvas, data, i) => {
    const { width, height, across } = data, at = i % (across * across);
    canvas.dataset.row = i;
    const image = await sheet(data.sheets[Math.floor(i / (across * across))]);
    if (canvas.dataset.row !== String(i)) return;
    canvas.getContext("2d").drawImage(
      image, (at % across) * width, Math.floor(at / across) * height, width, height, 0, 0, width, height);
  };
  const LINE = 40;
  const line = (canvas, values, i) => {
    const pen = canvas.getContext("2d"), found = values.map((column) => column.values[i]);
    const low = Math.min(...found), step = canvas.width / (found.length - 1);
    const scale = (canvas.height - 4) / (Math.max(...found) - low || 1);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.strokeStyle = "#fff";
    pen.beginPath();
    found.forEach((v, k) => pen.lineTo(k * step, canvas.height - 2 - (v - low) * scale));
    pen.stroke();
  };
  const facts = (list, i) => {
    const found = make("dl", "", { className: "facts", tabIndex: 0 });
    for (const column of list) found.append(make("dt", column.name), make("dd", written(column, i)));
    return found;
  };
  /** A function that shows the datum number i of some data in a box, with facts below it. */
  const shower = (box, data, dataColumns, more) => {
    let canvas = null, kept = dataColumns;
    if (data.sheets || (dataColumns.length > LINE && dataColumns.every(({ name }) => /^x\[\d+\]$/.test(name)))) {
      const large = Math.max(1, Math.floor(168 / Math.max(data.width || 1, data.height || 1)));
      canvas = make("canvas", "", { width: data.width || 320, height: data.height || 120 });
      canvas.setAttribute("role", "img");
      if (data.sheets) canvas.style.width = `${data.width * large}px`;
      kept = [];
    }
    return (i, name) => {
      const list = facts([...more, ...kept], i);
      if (canvas) {
        canvas.setAttribute("aria-label", name);
        if (data.sheets) draw(canvas, data, i); else line(canvas, dataColumns, i);
      }
      box.replaceChildren(...(canvas ? [canvas, list] : [list]));
    };
  };
  const showRow = shower($("row"), told.data, ofData, columns.filter((column) => column.group !== "coordinates"));

  // ------------------------------------------------------------------ map

  const options = (select, list, chosen) => {
    const groups = new Map();
    list.forEach((column) => {
      if (!groups.has(column.group)) groups.set(column.group, make("optgroup", "", { label: column.group }));
      groups.get(column.group).append(make("option", column.name, { value: every.indexOf(column), selected: column === chosen }));
    });
    select.append(...groups.values());
  };
  const coloured = every.filter((c) => (c.words ? c.words.length <= MOST_GROUPS : c.name !== "row"));
  const numeric = every.filter((c) => !c.words && c.name !== "row");
  options($("colour"), coloured, coloured.find((c) => c.group === "label") || coloured.find((c) => c.group === "scores"));
  options($("across"), numeric, axes[0]);
  options($("up"), numeric, axes[1] || numeric.find((c) => c.group === "scores"));

  const chart = echarts.init($("map"), null, { renderer: "canvas" });
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const chosen = (id) => every[Number($(id).value)];
  let marked = null;

  const drawMap = () => {
    const x = chosen("across"), y = chosen("up"), colour = grouped(chosen("colour"));
    const style = getComputedStyle(document.body);
    const [ink, quiet, rule] = ["--ink", "--quiet", "--line"].map((name) => style.getPropertyValue(name).trim());
    const parts = [...colour.colours, NONE].map(() => []);
    for (let i = 0; i < count; i += 1) {
      if (!Number.isNaN(x.values[i] + y.values[i])) parts[colour.groups[i] < 0 ? parts.length - 1 : colour.groups[i]].push(i);
    }
    const axis = (column) => ({
      type: "value", scale: true, name: column.name, nameLocation: "middle", nameGap: 28,
      nameTextStyle: { color: ink }, axisLabel: { color: quiet, hideOverlap: true }, splitLine: { lineStyle: { color: rule } },
      axisLine: { show: false }, axisTick: { show: false },
    });
    const dimensions = ["x", "y", "row"];
    const flat = (rows) => Float32Array.from(rows.flatMap((i) => [x.values[i], y.values[i], i]));
    const points = parts.map((rows, k) => ({
      id: `group ${k}`, type: "scatter", dimensions, encode: { x: 0, y: 1 }, data: flat(rows), large: true, largeThreshold: 0, symbolSize: count > 5000 ? 4 : 6,
      itemStyle: { color: colour.colours[k] || NONE, opacity: 0.75 }, emphasis: { disabled: true },
    }));
    chart.setOption({
      animation: false, grid: { left: 56, right: 16, top: 16, bottom: 44 }, xAxis: axis(x), yAxis: axis(y),
      brush: {
        xAxisIndex: 0, yAxisIndex: 0, brushMode: "single", outOfBrush: {}, throttleType: "debounce", throttleDelay: 50,
        brushStyle: { color: "rgba(128, 128, 128, .15)", borderColor: ink, borderWidth: 1 },
      },
      toolbox: { show: false },
      dataZoom: [{ type: "inside", xAxisIndex: 0, filterMode: "none" }, { type: "inside", yAxisIndex: 0, filterMode: "none" }],
      series: points.filter(({ data }) => data.length),
    }, { notMerge: true });
    legend(colour);
    mouse($("lasso").getAttribute("aria-pressed") === "true");
  };

  const legend = ({ colours, names, low, high }) => {
    const item = (colour, name) => {
      const found = make("span"), dot = make("i");
      dot.style.background = colour;
      found.append(dot, name);
      return found;
    };
    if (names) {
      $("legend").replaceChildren(...names.map((name, k) => item(colours[k], name)));
      return;
    }
    const scale = make("span", "", { className: "scale" });
    scale.style.background = `linear-gradient(to right, ${SCALE.join(", ")})`;
    const end = (v) => make("span", String(Number(v.toPrecision(3))).replace("-", "−"));
    $("legend").replaceChildren(end(low), scale, end(high));
  };

  const mouse = (lasso) => {
    $("lasso").setAttribute("aria-pressed", lasso);
    $("pan").setAttribute("aria-pressed", !lasso);
    chart.dispatchAction({
      type: "takeGlobalCursor", key: "brush", brushOption: { brushType: lasso ? "polygon" : false, brushMode: "single" },
    });
  };

  /** Move a mark, which lies over the map, to a point; hide it where there is none, or it is outside. */
  const markAt = (name, x, y) => {
    const at = chart.convertToPixel({ xAxisIndex: 0, yAxisIndex: 0 }, [x, y]);
    const isThere = at && chart.containPixel({ gridIndex: 0 }, at);
    $(name).hidden = !isThere;
    if (isThere) Object.assign($(name).style, { left: `${at[0]}px`, top: `${at[1]}px` });
  };
  const mark = () => {
    if (marked !== null) markAt("row-mark", chosen("across").values[marked], chosen("up").values[marked]);
  };
  const marks = () => { mark(); decodedAt(); };
  chart.on("datazoom", marks);
  chart.on("mousemove", (event) => {
    const i = event.value ? event.value[2] : null;
    if (i === null || i === marked) return;
    marked = i;
    showRow(i, "the row under the mouse");
    mark();
  });

  // ------------------------------------------------------------------ lasso

  const LISTED = 100, PICTURED = 60;
  const gallery = () => {
    if (!told.data.sheets) return;
    const point = (i) => { marked = i; showRow(i, "the row in the list"); mark(); };
    $("gallery").replaceChildren(...inside.slice(0, PICTURED).map((i) => {
      const canvas = make("canvas", "", { width: told.data.width, height: told.data.height });
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `row ${i + 1} of the map`);
      canvas.addEventListener("mouseenter", () => point(i));
      draw(canvas, told.data, i);
      return canvas;
    }));
  };
  const order = ["row", "label", "covariates", "scores", "data", "coordinates"];
  const listed = every.toSorted((a, b) => order.indexOf(a.group) - order.indexOf(b.group));
  let inside = [];
  const isInside = (x, y, polygon) => {
    let odd = false;
    for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i, i += 1) {
      const [xi, yi] = polygon[i], [xj, yj] = polygon[j];
      if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) odd = !odd;
    }
    return odd;
  };
  const list = () => {
    $("selected").textContent = inside.length
      ? `${inside.length} of ${count} rows${inside.length > LISTED ? `; the first ${LISTED} are listed` : ""}.`
      : "None: draw a line around some points of the map.";
    $("save").disabled = $("copy").disabled = !inside.length;
    $("listed").hidden = !inside.length;
    gallery();
    if (!inside.length) return;
    const table = make("table"), head = make("tr"), body = make("tbody"), top = make("thead");
    table.append(make("caption", "Rows in the lasso"), top, body);
    top.append(head);
    head.append(...listed.map((column) => make("th", column.name, { scope: "col", className: column.words ? "" : "number" })));
    for (const i of inside.slice(0, LISTED)) {
      const row = make("tr", "", { tabIndex: 0 });
      row.append(...listed.map((column) => make("td", written(column, i), { className: column.words ? "" : "number" })));
      row.addEventListener("mouseenter", () => { marked = i; showRow(i, "the row in the list"); mark(); });
      body.append(row);
    }
    $("listed").replaceChildren(table);
  };
  chart.on("brushEnd", ({ areas }) => {
    const polygon = areas.length ? areas[0].coordRange : null, x = chosen("across").values, y = chosen("up").values;
    inside = polygon ? [...Array(count).keys()].filter((i) => isInside(x[i], y[i], polygon)) : [];
    list();
  });
  /** A cell of a CSV that no spreadsheet computes. */
  const cell = (column, i) => {
    const value = column.values[i];
    if (!column.words) return Number.isNaN(value) ? "" : String(value);
    const word = value < 0 ? "" : column.words[value];
    return quoted(/^[=+\-@\t\r\n]/.test(word) ? `'${word}` : word);
  };
  const quoted = (word) => (/[",\n\r]/.test(word) ? `"${word.replaceAll('"', '""')}"` : word);
  const csv = () => [listed.map((column) => quoted(column.name)), ...inside.map((i) => listed.map((column) => cell(column, i)))]
    .map((cells) => `${cells.join(",")}\n`).join("");
  $("save").addEventListener("click", () => {
    const link = make("a", "", { href: URL.createObjectURL(new Blob([csv()], { type: "text/csv" })), download: "rows.csv" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
  $("copy").addEventListener("click", async () => {
    const numbers = columns.find((column) => column.name === "row" && column.group === "row");
    await navigator.clipboard.writeText(inside.map((i) => numbers.values[i]).join(", "));
    $("copy").textContent = "Copied";
  });

  // ------------------------------------------------------------------ sliders

  const inputs = [];
  let decodedAt = () => {};
  if (told.decoded) {
    const places = told.decoded.columns.map(read), ofDecoded = (told.decoded.data.columns || []).map(read);
    const show = shower($("decoded"), told.decoded.data, ofDecoded, []);
    const steps = told.sliders[0].values.length, joint = Math.min(2, told.sliders.length);
    let moved = 0;
    const number = () => {
      const at = inputs.map((input) => Number(input.value));
      if (moved < joint) return joint === 1 ? at[0] : at[0] * steps + at[1];
      return steps ** joint + (moved - joint) * steps + at[moved];
    };
    decodedAt = () => {
      const of = (column) => places.find((place) => place.name === column.name && column.group === "coordinates");
      const x = of(chosen("across")), y = of(chosen("up")), i = number();
      if (x && y) markAt("decoded-mark", x.values[i], y.values[i]); else $("decoded-mark").hidden = true;
    };
    told.sliders.forEach(({ name, values }, k) => {
      const label = make("label"), title = make("span", name), shown = make("output");
      const input = make("input", "", { type: "range", min: 0, max: values.length - 1, step: 1 });
      input.value = (values.length - 1) / 2;
      const write = () => { shown.textContent = String(Number(values[input.value].toPrecision(2))).replace("-", "−"); };
      input.addEventListener("input", () => {
        moved = k;
        write();
        [...$("sliders").children].forEach((other, j) => other.classList.toggle("moved", k < joint ? j < joint : j === k));
        show(number(), "the decoded mean");
        decodedAt();
      });
      write();
      label.append(title, input, shown);
      $("sliders").append(label);
      inputs.push(input);
    });
    show(number(), "the decoded mean");
  } else {
    $("why").textContent = told.why;
  }

  for (const id of ["colour", "across", "up"]) {
    $(id).addEventListener("change", () => { inside = []; list(); drawMap(); });
  }
  $("lasso").addEventListener("click", () => mouse(true));
  $("pan").addEventListener("click", () => mouse(false));
  $("whole").addEventListener("click", () => { inside = []; list(); drawMap(); });
  dark.addEventListener("change", drawMap);
  new ResizeObserver(() => { if (chart.getWidth() !== $("map").clientWidth) chart.resize(); }).observe($("map"));
  chart.on("finished", () => {
    document.body.dataset.drawn ||= Math.round(performance.now());
    marks();
  });
  drawMap();
})();
