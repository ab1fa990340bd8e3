"""The look of the report page: light and dark, on a desk and on a phone."""

PAGE = """\
:root {
  --paper: #ffffff; --ink: #1f2328; --muted: #656d76; --line: #e4e7eb; --soft: #f4f6f8;
  --planned: #9ec0e8; --measured: #2a78d6; --over: #c93c37; --warn: #fff6e0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181c; --ink: #e6e8eb; --muted: #9aa3ad; --line: #30353c; --soft: #1f2329;
    --planned: #35587f; --measured: #4a94ea; --over: #e5655f; --warn: #3a3018;
  }
  img { filter: invert(0.91) hue-rotate(180deg); }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 0.75rem; font-size: 1.1rem; border-bottom: 1px solid var(--line); padding-bottom: 0.3rem; }
h3 { margin: 1.25rem 0 0.25rem; font-size: 0.9rem; color: var(--muted); font-weight: 600; }
header p, section p { margin: 0.25rem 0; color: var(--muted); }
.loss { margin: 1.5rem 0; font-size: 2.4rem; font-weight: 600; line-height: 1.2; }
.loss span { display: block; font-size: 0.9rem; font-weight: 400; color: var(--muted); }
.loss small { font-size: 1.1rem; font-weight: 400; color: var(--muted); margin-left: 0.5rem; }
.tiles { display: flex; flex-wrap: wrap; gap: 0.75rem; margin: 0; }
.tiles div { flex: 1 1 8rem; background: var(--soft); border-radius: 8px; padding: 0.6rem 0.9rem; }
.tiles dt { font-size: 0.8rem; color: var(--muted); }
.tiles dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.warnings { background: var(--warn); border-radius: 8px; padding: 0.1rem 1rem 0.5rem; margin-top: 1.5rem; }
.warnings h2 { margin: 0.5rem 0 0; border: 0; }
.wide { overflow-x: auto; }
img { display: block; width: 100%; min-width: 26rem; height: auto; }
figure { margin: 0.75rem 0; }
figcaption { font-size: 0.9rem; color: var(--muted); }
svg { display: block; width: 100%; height: auto; background: var(--soft); border-radius: 4px; }
polyline { fill: none; stroke: var(--measured); stroke-width: 2; vector-effect: non-scaling-stroke; }
.sample { border-left: 3px solid var(--line); padding-left: 0.9rem; margin: 1rem 0; overflow-wrap: anywhere; }
.sample pre { margin: 0; white-space: pre-wrap; font: 0.85rem/1.4 ui-monospace, monospace; color: var(--muted); }
.sample dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.1rem 1rem; margin: 0.4rem 0 0; }
.sample dt { font-size: 0.85rem; color: var(--muted); }
.sample dd { margin: 0; white-space: pre-wrap; }
.bar { display: grid; grid-template-columns: 6rem 1fr 15rem; gap: 0.75rem; align-items: center; margin: 0.35rem 0; }
.track { position: relative; height: 1.1rem; background: var(--soft); border-radius: 4px; }
.track i { display: block; height: 100%; border-radius: 4px; min-width: 2px; }
.track b { position: absolute; top: -3px; bottom: -3px; width: 2px; margin-left: -2px; background: var(--ink); }
.planned { background: var(--planned); } .measured { background: var(--measured); } .over { background: var(--over); }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.3rem 1rem 0.3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 400; color: var(--muted); }
.pairs { width: auto; }
.stack { display: flex; height: 1.4rem; border-radius: 4px; overflow: hidden; }
.stack i { height: 100%; min-width: 1px; }
.legend { display: flex; flex-wrap: wrap; gap: 0.1rem 1rem; font-size: 0.8rem; }
.legend i { display: inline-block; width: 0.7rem; height: 0.7rem; border-radius: 2px; margin-right: 0.35rem; }
.wide thead th, .wide td:first-child { white-space: nowrap; }
.ledger td:nth-child(2) { white-space: nowrap; }
.ledger td:nth-child(3) { font-family: ui-monospace, monospace; font-size: 0.8rem; color: var(--muted); }
.ledger tbody tr:last-child td { border-bottom: 0; font-weight: 600; }
summary { cursor: pointer; color: var(--muted); margin: 0.5rem 0; }
ul { margin: 0.25rem 0 0.75rem; padding-left: 1.25rem; }
@media (max-width: 40rem) {
  main { padding: 1rem 0.9rem 3rem; }
  .loss { font-size: 1.8rem; }
  .bar, .sample dl { grid-template-columns: 1fr; gap: 0.1rem; }
  .sample dd { margin-bottom: 0.3rem; }
  .ledger thead { display: none; }
  .ledger tr { display: grid; grid-template-columns: 1fr max-content; border-bottom: 1px solid var(--line); }
  .ledger td { border: 0; padding: 0.2rem 0; }
  .ledger td:nth-child(3) { grid-column: 1 / -1; padding-top: 0; }
  .ledger td:first-child { white-space: normal; }
}
"""
