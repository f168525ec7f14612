"""The look of an HTML report: the app's colours, light and dark by the reader's system."""

from evaluation.report.svg import PLOT_CSS

CSS = (
    """
:root { color-scheme:light dark; --un-accent:#1f5f8b; --un-ink:#1c2430; --un-quiet:#55606e;
  --un-line:#d5dbe2; --un-paper:#ffffff; --un-soft:#f4f6f8; --un-diff:#fff1c9; --un-warn:#8a4b08;
  --un-two:#a84c14; --un-three:#4f6a1e; --un-four:#80479c; }
@media (prefers-color-scheme: dark) { :root { --un-accent:#8fc7ee; --un-ink:#e8ecf1;
  --un-quiet:#aeb8c4; --un-line:#3a4450; --un-paper:#171c22; --un-soft:#1f262e;
  --un-diff:#4a3d12; --un-warn:#f0b36f; --un-two:#f0a36f; --un-three:#b3d37c;
  --un-four:#d3a6ea; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--un-paper); color:var(--un-ink);
  font:400 1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif; }
header.un-head, main { max-width:1480px; margin:0 auto; padding:0 1.25rem; }
h1 { font-size:1.6rem; letter-spacing:-.015em; line-height:1.2; margin:2rem 0 .6rem; }
h2 { font-size:1.2rem; letter-spacing:-.01em; margin:2.6rem 0 .7rem; padding-top:.7rem;
  border-top:1px solid var(--un-line); }
h3 { font-size:1rem; margin:1.6rem 0 .5rem; } h4 { font-size:.92rem; margin:1rem 0 .3rem; }
p { margin:.5rem 0; max-width:80ch; overflow-wrap:anywhere; }
a { color:var(--un-accent); text-underline-offset:2px; }
nav ul { display:flex; flex-wrap:wrap; gap:.2rem 1.1rem; list-style:none; margin:0; padding:0;
  font-size:.9rem; } nav a { display:inline-block; padding:.2rem 0; }
small, .un-quiet { color:var(--un-quiet); } .un-quiet { font-size:.85rem; }
.un-note { border-left:3px solid var(--un-warn); background:var(--un-soft); padding:.5rem .9rem;
  border-radius:0 6px 6px 0; max-width:none; } .un-note b { color:var(--un-warn); }
.un-scroll { overflow-x:auto; max-width:100%; margin:.8rem 0 1.2rem; }
.un-scroll:focus-visible, pre:focus-visible, summary:focus-visible, a:focus-visible {
  outline:2px solid var(--un-accent); outline-offset:2px; }
table { border-collapse:collapse; font-size:.86rem; line-height:1.4;
  font-variant-numeric:tabular-nums; min-width:min(100%,34rem); }
caption { text-align:left; color:var(--un-quiet); font-size:.85rem; padding-bottom:.4rem; }
caption span { position:sticky; left:0; display:inline-block; max-width:calc(100vw - 2.4rem); }
th, td { text-align:left; vertical-align:top; padding:.45rem .8rem .45rem 0;
  border-bottom:1px solid var(--un-line); font-weight:400; }
thead th { vertical-align:bottom; color:var(--un-quiet); font-weight:600; font-size:.8rem; }
tbody th { font-weight:650; position:sticky; left:0; background:var(--un-paper); }
th small, td small { display:block; font-size:.74rem; font-weight:400; white-space:nowrap; }
thead small { white-space:normal; } .un-num { text-align:right; }
td.un-num { white-space:nowrap; }
.un-words { min-width:17rem; max-width:72ch; } .un-text td:last-child { overflow-wrap:anywhere; }
.un-published td, .un-published th { color:var(--un-quiet); font-style:italic; font-weight:400; }
.un-reference td, .un-reference th, .un-total td, .un-total th { background:var(--un-soft); }
.un-plots { display:grid; gap:1.6rem 2.2rem; margin:.8rem 0;
  grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr)); }
.un-plots.un-one { grid-template-columns:minmax(0,620px); }
.un-figure { margin:0; min-width:0; } .un-plot { display:block; width:100%; height:auto;
  max-width:620px; background:none; }
figcaption { font-size:.85rem; color:var(--un-quiet); margin-top:.35rem; max-width:72ch;
  overflow-wrap:anywhere; } figcaption b { color:var(--un-ink); font-weight:600; }
pre { background:var(--un-soft); border:1px solid var(--un-line); border-radius:6px;
  padding:.7rem .9rem; overflow-x:auto; white-space:pre-wrap; overflow-wrap:anywhere;
  font:.82rem/1.5 ui-monospace,Menlo,Consolas,monospace; }
details { border-top:1px solid var(--un-line); } summary { padding:.55rem 0; cursor:pointer; }
details[open] > summary { font-weight:650; }
.un-answers ol { padding-left:1.6rem; margin:.3rem 0 1rem; } .un-answers li { margin:.9rem 0; }
.un-answers li p { margin:.15rem 0; } .un-question { font-weight:600; }
.un-answers dl { display:grid; grid-template-columns:max-content minmax(0,1fr); gap:.15rem .9rem;
  margin:.2rem 0; } dt { color:var(--un-quiet); font-size:.85rem; padding-top:.1rem; }
dd { margin:0; overflow-wrap:anywhere; max-width:80ch; }
ins { background:var(--un-diff); font-weight:650; text-decoration:underline;
  text-decoration-thickness:2px; text-underline-offset:3px; }
del { color:var(--un-quiet); text-decoration:line-through; }
@media (max-width:560px) { header.un-head, main { padding:0 .9rem; }
  .un-answers dl { grid-template-columns:1fr; } tbody th { max-width:9.5rem; } }
@media print { details > * { display:block; }
  .un-scroll { overflow:visible; } nav { display:none; } }
"""
    + PLOT_CSS
)
