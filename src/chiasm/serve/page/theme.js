// Runs before the first paint, so that a dark page never flashes white.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const apply = () => {
    let chosen = "auto";
    try {
      chosen = localStorage.getItem("chiasm.theme") || "auto";
    } catch {
      // storage may be forbidden: the system's theme is used
    }
    root.dataset.choice = chosen;
    root.dataset.theme = chosen === "auto" ? (dark.matches ? "dark" : "light") : chosen;
  };
  apply();
  dark.addEventListener("change", apply);
  addEventListener("chiasm-theme", apply);
})();
