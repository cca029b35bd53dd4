"use strict";
(() => {
  const names = ["ground", "ink", "soft", "line", "accent", "muted", "low"];
  const further = { false: ["#c2410c", "#0f766e", "#7c3aed", "#a16207", "#be185d", "#4d7c0f", "#475569"],
                    true: ["#fb923c", "#2dd4bf", "#c4b5fd", "#facc15", "#f9a8d4", "#a3e635", "#cbd5e1"] };
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const plots = [...document.querySelectorAll(".plot")];

  const theme = () => {
    const css = getComputedStyle(document.documentElement);
    const of = Object.fromEntries(names.map((name) => [name, css.getPropertyValue("--" + name).trim()]));
    of.palette = [of.accent, ...further[dark.matches]];
    return of;
  };

  const coloured = (trace, of) => {
    const place = trace.meta && trace.meta.colour;
    if (trace.type === "heatmap") return { ...trace, colorscale: [[0, of.low], [1, of.accent]] };
    const colour = typeof place === "string" ? of[place] : of.palette[(place || 0) % of.palette.length];
    const shown = trace.type === "bar" ? {} : { line: { width: 2, ...trace.line, color: colour } };
    return { ...trace, ...shown, marker: { ...trace.marker, color: colour } };
  };

  const draw = (plot) => {
    const of = theme();
    const { data, layout } = JSON.parse(plot.querySelector("script").textContent);
    const narrow = plot.clientWidth < 420;
    const named = layout.showlegend === false ? [] : data.filter((trace) => trace.showlegend !== false);
    const longest = Math.max(0, ...named.map((trace) => (trace.name || "").length));
    const columns = Math.max(1, Math.floor((plot.clientWidth - 60) / (56 + 6.5 * longest)));
    const below = named.length ? 14 + 20 * Math.ceil(named.length / columns) : 0;  // pixels of the legend
    const axis = (own) => ({ gridcolor: of.line, linecolor: of.line, zeroline: false, automargin: true, ...own });
    const shapes = (layout.shapes || []).map((shape) => ({ ...shape, line: { ...shape.line, color: of.ink, width: 1.5 } }));
    const whole = {
      ...layout, shapes, autosize: true, height: Number(plot.dataset.height) + below,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: narrow ? 11 : 12, color: of.soft },
      margin: { l: 48, r: 12, t: 28, b: 48 + below },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: of.muted, activecolor: of.accent },
      legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, font: { color: of.ink }, traceorder: "normal" },
      hoverlabel: { bgcolor: of.ground, bordercolor: of.line, font: { color: of.ink } },
      xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis), dragmode: false,
    };
    const buttons = [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]];  // none that go online
    const config = { responsive: true, displaylogo: false, scrollZoom: false, modeBarButtons: buttons };
    const target = plot.querySelector(".canvas");
    return Plotly.react(target, data.map((trace) => coloured(trace, of)), whole, config).then(() => {
      plot.dataset.drawn = target.querySelectorAll(".scatterlayer .trace, .barlayer .point, .heatmaplayer image").length;
    });
  };

  const all = () => Promise.all(plots.map(draw)).then(() => { document.documentElement.dataset.drawn = plots.length; });
  dark.addEventListener("change", all);
  all();
})();
