"""The look of the app: one accent, system fonts, light and dark by the reader's system."""

from evaluation.report.plots import colour_css

CSS = (
    f"""
{colour_css()}
{colour_css(".dark", dark=True)}
"""
    + """
.dark { --color-accent:#8fc7ee !important; }
.gradio-container { max-width:min(100%,1680px) !important; width:100%; min-width:0; margin:auto; }
.gradio-container .column { min-width:0; }
#un-sheet, #un-runs, #un-logs { max-width:100%; }
.un-head { display:flex; flex-wrap:wrap; gap:.25rem 1rem; align-items:baseline; }
.un-head h1 { font-size:1.35rem; font-weight:650; letter-spacing:-.01em; margin:0; }
.un-head p, .un-quiet, .un-foot, .un-sub { color:var(--un-quiet); margin:0; font-size:.875rem; }
.un-sub { overflow-wrap:anywhere; }
.un-card { border:1px solid var(--un-line); border-radius:8px; padding:.9rem 1rem 1rem;
  background:var(--un-paper); color:var(--un-ink); }
.un-card { box-sizing:border-box; flex:1 1 auto; }
.un-card header { display:flex; justify-content:space-between; gap:1rem; align-items:baseline; }
.un-card h2 { font-size:1rem; font-weight:650; margin:0; }
.un-answer { font-size:1.05rem; line-height:1.6; min-height:4.8em; margin:.6rem 0;
  max-width:68ch; overflow-wrap:anywhere; }
.un-verdict { border:1px solid currentColor; border-radius:99px; padding:.05rem .6rem;
  font-size:.8rem; font-weight:600; color:var(--un-accent); white-space:nowrap; }
mark.un-diff { background:var(--un-diff); color:inherit; font-weight:650;
  text-decoration:underline; text-decoration-thickness:2px; text-underline-offset:3px; }
.un-scores { overflow-x:auto; max-width:760px; }
.un-scores table, .un-table, .un-scores th, .un-scores td, .un-table th, .un-table td,
.un-scores tr, .un-table tr, .un-scores thead, .un-table thead { border:0 !important;
  background:none; }
.un-scores td, .un-scores th, .un-table td, .un-table th {
  border-bottom:1px solid var(--un-line) !important; padding:.45rem 1rem .45rem 0 !important; }
#un-adapters .un-table td:nth-child(6) { white-space:nowrap; }
.un-plots { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));
  gap:1.5rem; } .un-plots h2 { font-size:1rem; font-weight:650; margin:.5rem 0 0; }
:is(#un-sheet, #un-runs, #un-logs) :is(td, th) { font-family:inherit; }
:is(#un-sheet, #un-runs, #un-logs) :is(.cell-wrap, span) {
  font-family:system-ui,sans-serif; font-size:.875rem; }
#un-examples button { justify-content:flex-start; text-align:left; font-weight:400; }
#un-clear, #un-cancel, #un-clear-history, #un-pair, #un-resume { align-self:center; }
#un-left, #un-left > div, #un-left > div > div, #un-right, #un-right > div,
#un-right > div > div { display:flex; flex-direction:column; flex:1 1 auto; }
.un-scores th[scope=row] { width:60%; } .un-part { font-size:1rem; font-weight:650; }
.gradio-container input[type=range]::-webkit-slider-thumb { border:2px solid var(--un-accent); }
.gradio-container input[type=range]::-moz-range-thumb { border:2px solid var(--un-accent); }
.un-scores table, .un-table { border-collapse:collapse; width:100%; font-size:.9rem;
  color:var(--un-ink); font-variant-numeric:tabular-nums; }
.un-scores th, .un-scores td, .un-table th, .un-table td { text-align:left; vertical-align:top;
  padding:.4rem .7rem .4rem 0; border-bottom:1px solid var(--un-line); font-weight:400; }
.un-table th[scope=col], .un-scores th[scope=col] { color:var(--un-quiet); font-size:.8rem;
  white-space:nowrap; }
.un-table th[scope=row] { font-weight:650; }
.un-scores td { white-space:nowrap; }
.un-scores small { display:block; color:var(--un-quiet); font-size:.78rem; }
.un-truth { margin:.2rem 0 .6rem; max-width:80ch; line-height:1.5; }
.un-scroll { overflow-x:auto; max-width:100%; }
.un-table td { min-width:5rem; } .un-table td:last-child { min-width:13rem; }
#un-first { border:1px solid var(--un-line); border-radius:8px; padding:1rem;
  background:var(--un-soft); }
#un-first .block { background:none; } .un-first { line-height:1.55; color:var(--un-ink); }
.un-first h2 { font-size:1.15rem;
  font-weight:650; margin:.4rem 0; } .un-first p { max-width:72ch; margin:.3rem 0; }
.un-card code { font-size:.8rem; overflow-wrap:anywhere; background:none; padding:0; }
.un-note { border-left:3px solid var(--un-accent); padding:.35rem .8rem; background:var(--un-soft);
  color:var(--un-ink); border-radius:0 6px 6px 0; overflow-wrap:anywhere; }
.un-hidden { position:absolute; width:1px; height:1px; overflow:hidden; clip-path:inset(50%); }
.un-figure { margin:.5rem 0 0; } .un-figure figcaption { font-size:.85rem;
  color:var(--un-quiet); overflow-wrap:anywhere; }
.un-plot { display:block; width:100%; height:auto; max-width:520px; }
.un-table caption { text-align:left; color:var(--un-quiet); font-size:.85rem; }
.un-table small { display:block; color:var(--un-quiet); }
.un-preview { font-size:.95rem; line-height:1.6; margin:0 0 .5rem; overflow-wrap:anywhere; }
.un-plan { display:grid; grid-template-columns:max-content 1fr; gap:.25rem 1rem; font-size:.92rem; }
.un-plan dt { color:var(--un-quiet); } .un-plan dd { margin:0; }
progress { width:100%; height:.5rem; appearance:none; border:0; background:var(--un-line);
  accent-color:var(--un-accent); }
progress::-webkit-progress-bar { background:var(--un-line); }
progress::-webkit-progress-value { background:var(--un-accent); }
progress::-moz-progress-bar { background:var(--un-accent); }
.un-command { display:flex; flex-wrap:wrap; gap:.3rem .8rem; align-items:center;
  color:var(--un-ink); } .un-command h2 { font-size:.85rem; font-weight:600; margin:0; }
.un-command pre { order:3; flex:1 1 100%; margin:0; padding:.5rem .7rem; overflow-x:auto;
  background:var(--un-soft); border:1px solid var(--un-line); border-radius:6px; }
.un-command code { font-family:ui-monospace,SFMono-Regular,Menlo,monospace; font-size:.82rem;
  background:none; padding:0; color:inherit; white-space:pre-wrap; overflow-wrap:anywhere; }
.un-log pre { max-height:20rem; overflow:auto; font-size:.8rem; white-space:pre-wrap; }
.un-copy { margin-left:auto; padding:.15rem .7rem; font-size:.82rem; border-radius:6px;
  border:1px solid var(--un-line); background:var(--un-paper); color:var(--un-ink); }
.un-copy:focus-visible, .un-command pre:focus-visible { outline:2px solid var(--un-accent);
  outline-offset:2px; }
@media (prefers-reduced-motion: reduce) {
  * { animation:none !important; transition:none !important; } }
"""
)

# Esc stops the answer that is being written, wherever the focus is; Enter is the form's own.
# The language lets a screen reader choose its voice.
HEAD = """
<script>
document.documentElement.lang = "en";
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-un-copy]");
  if (!button) return;
  const code = button.parentElement.querySelector("code");
  const said = (text) => { button.textContent = text; };
  const mark = () => {  // without the right to the clipboard the text is marked, ready to copy
    getSelection().selectAllChildren(code);
    said("Marked: press Ctrl+C");
  };
  if (!navigator.clipboard) mark();
  else navigator.clipboard.writeText(code.textContent).then(() => said("Copied"), mark);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  const stop = document.querySelector("#un-stop");
  if (stop && !stop.disabled) stop.click();
});
</script>
"""
