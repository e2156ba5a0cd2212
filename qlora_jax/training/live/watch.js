
watchRun(document.getElementById("run"), () => fetch("run", { cache: "no-cache" }), status => {
  document.title = `${status.total_steps ? `${Math.floor(100 * status.step / status.total_steps)} % ` : ""}${status.name}`;
});
