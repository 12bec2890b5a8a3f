"""The style sheet of the HTML report, for light and dark screens, wide and narrow ones."""

STYLE = """
:root {
  color-scheme: light dark;
  --bg: #fcfcfb; --card: #fff; --ink: #1c1e21; --soft: #5c626b; --line: #e3e4e1;
  --kept: #3a66b1; --whole: #dfe5ee; --control: #b9541f;
  --good: #1f7a4d; --goodbg: #e4f3ea; --bad: #b3261e; --badbg: #fbe6e4;
  --first: .38; --span: .4; /* lightness of the first block's curve, and how much lighter the last one's is */
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #15171a; --card: #1c1f23; --ink: #e8e9ea; --soft: #a0a6ae; --line: #33373d;
    --kept: #7ea6ea; --whole: #2e3540; --control: #e58a55;
    --good: #6fd3a0; --goodbg: #17352a; --bad: #ff9a90; --badbg: #431d1a;
    --first: .52; --span: .34;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--bg); color: var(--ink); overflow-wrap: anywhere; font-variant-numeric: tabular-nums;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
}
main { max-width: 940px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 4px 0 12px; font-weight: 650; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 44px 0 10px; font-weight: 650; }
p { margin: 0 0 10px; max-width: 72ch; }
.soft, caption, figcaption, .legend, dt { color: var(--soft); font-size: .875rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 22px 0 0; }
.tiles div, figure, pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tiles div, figure, pre { padding: 12px 14px; }
.tiles dd { margin: 0; font-size: 1.4rem; font-weight: 600; line-height: 1.5; }
.tiles dd + dd { color: var(--soft); font-size: .8125rem; font-weight: 400; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
caption { text-align: left; padding: 0 0 6px; }
th, td { padding: 6px 0 6px 14px; border-bottom: 1px solid var(--line); }
th, td { text-align: right; font-weight: 400; white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; white-space: normal; min-width: 7rem; }
thead th { color: var(--soft); font-size: .8125rem; }
.part { display: block; padding-left: 16px; color: var(--soft); }
span > .part { padding-left: 0; font-size: .8125rem; }
.bars td:last-child { width: 55%; }
.bars th:last-child { text-align: left; }
.bar { display: block; height: 9px; border-radius: 2px; width: var(--w); min-width: 1px; background: var(--kept); }
.badge { display: inline-block; padding: 1px 12px; border-radius: 99px; font-weight: 600; font-size: .8125rem; }
.badge { margin-left: 6px; vertical-align: 2px; }
.good { color: var(--good); background: var(--goodbg); }
.bad { color: var(--bad); background: var(--badbg); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 16px; }
figure { margin: 0; min-width: 0; }
figure.narrow { max-width: 520px; margin-top: 14px; }
figcaption b { color: var(--ink); font-weight: 600; }
svg { display: block; width: 100%; height: auto; margin-top: 8px; font-size: 11px; }
svg text { fill: var(--soft); }
svg .strong { fill: var(--ink); }
.grid { stroke: var(--line); }
.cut { stroke: var(--ink); stroke-dasharray: 3 3; }
.limit { stroke: var(--ink); stroke-width: 1.5; }
.whole { fill: var(--whole); }
.kept { fill: var(--kept); }
.control, g:hover > .kept { fill: var(--control); }
[style*="--t"] { --shade: oklch(calc(var(--first) + var(--t) * var(--span)) .16 calc(285 + var(--t) * 150)); }
.curve { fill: none; stroke: var(--shade); stroke-width: 1.1; }
g:hover > .curve { stroke-width: 2.6; }
.dot { fill: var(--ink); }
.ramp { display: inline-flex; margin: 0 8px; vertical-align: -1px; }
.ramp span { width: 9px; height: 11px; background: var(--shade); }
.sample { display: grid; grid-template-columns: 1fr 1fr; gap: 0 24px; }
.sample.three { grid-template-columns: 1fr 1fr 1fr; }
.sample { border-top: 1px solid var(--line); padding: 14px 0 4px; }
.sample p { white-space: pre-wrap; }
.sample > p { grid-column: 1 / -1; max-width: none; }
.sample h3 { font-size: .8125rem; font-weight: 400; color: var(--soft); margin: 0; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 2px 20px; margin: 18px 0 0; font-size: .9375rem; }
.facts dt { align-self: baseline; }
.facts dd { margin: 0; }
pre {
  overflow-x: auto; overflow-wrap: normal; margin: 10px 0;
  font: .8125rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
summary { cursor: pointer; }
@media (max-width: 560px) {
  main { padding: 24px 16px 48px; }
  .sample, .sample.three { grid-template-columns: 1fr; }
  table { font-size: .875rem; }
  svg { font-size: 12.5px; }
  th, td { padding-left: 10px; }
  .bars td:last-child { width: 40%; }
  .tiles { grid-template-columns: 1fr 1fr; }
}
.point { fill: var(--shade); } .thick { stroke-width: 1.7; }
"""
