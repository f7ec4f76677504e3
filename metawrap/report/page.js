"use strict";
// Draws each panel's charts from the JSON beside them, and follows its controls and the colours of the system.
(function () {
  // Plotly's bar of buttons would cover the legend.
  const config = { responsive: true, displayModeBar: false };
  const narrow = window.matchMedia("(max-width: 520px)");
  const touched = window.matchMedia("(pointer: coarse)").matches;
  const panels = [];

  const onPaper = { "--ink": "#1d2530", "--grid": "#e4e8ee", "--card": "#f6f8fb", "--soft": "#5c6878" };

  function colour(name, forPaper) {
    return forPaper ? onPaper[name] : getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function themed(layout, forPaper) {
    const [ink, grid, card, soft] = ["--ink", "--grid", "--card", "--soft"].map((name) => colour(name, forPaper));
    const small = narrow.matches && !forPaper ? 11 : 13;
    const shown = Object.assign({}, layout, {
      paper_bgcolor: forPaper ? "#ffffff" : "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, size: small, family: "system-ui, sans-serif" },
      hoverlabel: { bgcolor: card, bordercolor: grid, font: { color: ink } },
      // A finger that scrolls the page must not zoom.
      dragmode: touched ? false : "zoom",
    });
    for (const name of ["xaxis", "yaxis"]) {
      shown[name] = Object.assign({}, layout[name], { gridcolor: grid, linecolor: grid, zerolinecolor: soft });
    }
    return shown;
  }

  function draw(panel) {
    const choice = panel.choice ? Number(panel.choice.value) : 0;
    const names = panel.content.slides[choice] || [];
    const place = panel.slider && names.length ? Math.min(Number(panel.slider.value), names.length - 1) : null;
    if (panel.slider) {
      panel.slider.max = Math.max(0, names.length - 1);
      panel.output.textContent = place === null ? "" : names[place];
    }
    for (const chart of panel.content.charts) {
      const state = chart.states[choice];
      const slide = place === null ? [] : state.slides[place] || [];
      const ink = { textfont: { color: colour("--ink") } };
      const data = state.data.map((trace, index) => Object.assign({}, trace, "text" in trace ? ink : {}, slide[index]));
      const layout = themed(state.layout);
      // The slider leaves hidden lines and the zoom as they are; another choice begins anew.
      layout.uirevision = "choice " + choice;
      Plotly.react("chart-" + chart.name, data, layout, config);
    }
  }

  function play(panel, button) {
    if (panel.timer) {
      clearInterval(panel.timer);
      panel.timer = null;
      button.textContent = "▶";
      return;
    }
    const last = Number(panel.slider.max);
    if (Number(panel.slider.value) >= last) panel.slider.value = 0;
    button.textContent = "⏸";
    draw(panel);
    panel.timer = setInterval(function () {
      panel.slider.value = Number(panel.slider.value) + 1;
      draw(panel);
      if (Number(panel.slider.value) >= Number(panel.slider.max)) play(panel, button);
    }, Math.max(120, Math.min(700, 8000 / (last + 1))));
  }

  for (const element of document.querySelectorAll(".panel")) {
    const content = JSON.parse(element.querySelector("script[type='application/json']").textContent);
    const panel = {
      content: content,
      choice: element.querySelector(".choice"),
      slider: element.querySelector(".slider"),
      output: element.querySelector("output"),
      timer: null,
    };
    const button = element.querySelector(".play");
    if (panel.slider) panel.slider.addEventListener("input", () => draw(panel));
    if (panel.choice) {
      panel.choice.addEventListener("change", function () {
        if (panel.slider) {
          panel.slider.max = Math.max(0, (content.slides[Number(panel.choice.value)] || []).length - 1);
          panel.slider.value = panel.slider.max;
        }
        draw(panel);
      });
    }
    if (button) button.addEventListener("click", () => play(panel, button));
    for (const each of element.querySelectorAll(".save")) each.addEventListener("click", () => save(each, panel));
    panels.push(panel);
    draw(panel);
  }

  // As on a white page, for papers, with the lines and the epoch that are shown now.
  async function save(button, panel) {
    const figure = button.closest("figure"), chart = figure.querySelector(".chart"), form = button.dataset.form;
    const size = { width: 800, height: Math.max(480, chart.layout.height) };
    const layout = Object.assign(themed(chart.layout, true), size, { margin: { l: 16, r: 24, t: 24, b: 16 } });
    const axis = layout.yaxis, caption = figure.querySelector("figcaption span").innerHTML;
    axis.title = Object.assign({}, axis.title, axis.title.text ? {} : { text: caption });
    const ink = { textfont: { color: layout.font.color } };
    const data = chart.data.map((trace) => Object.assign({}, trace, "text" in trace ? ink : {}));
    for (const [mark, name] of panel.content.key) {
      const marker = { symbol: mark, size: 9, color: colour("--soft", true) };
      data.push({ type: "scatter", mode: "markers", x: [null], y: [null], name: name, marker: marker });
    }
    const link = document.createElement("a");
    link.href = await Plotly.toImage({ data, layout }, Object.assign({ format: form, scale: form === "png" ? 2 : 1 }, size));
    link.download = chart.id.replace("chart-", "metawrap-") + "." + form;
    link.click();
  }

  const redraw = () => panels.forEach(draw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  narrow.addEventListener("change", redraw);

  function copied(button) {
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }

  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", function () {
      const code = button.parentElement.querySelector("code");
      const select = function () {
        // Where a page in a file may not write to the clipboard: by selection.
        const range = document.createRange();
        range.selectNodeContents(code);
        const selection = window.getSelection();
        selection.removeAllRanges();
        selection.addRange(range);
        if (document.execCommand("copy")) copied(button);
      };
      if (navigator.clipboard) navigator.clipboard.writeText(code.textContent).then(() => copied(button), select);
      else select();
    });
  }
})();
