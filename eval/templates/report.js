for (const button of document.querySelectorAll("table.sorts th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, table = head.closest("table"), column = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => {
      const number = row.cells[column].dataset.number;
      return number === undefined ? undefined : Number(number.replace("inf", "Infinity"));
    };
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const x = key(a), y = key(b);
      // Cells without a number stay last among numbers, whichever way the column is sorted.
      if (x === undefined && y === undefined) {
        const order = a.cells[column].textContent.localeCompare(b.cells[column].textContent, undefined, {numeric: true});
        return down ? -order : order;
      }
      if (x === undefined || y === undefined) return x === undefined ? 1 : -1;
      return (down ? -1 : 1) * (x > y ? 1 : x < y ? -1 : 0);
    });
    table.tBodies[0].append(...rows);
  });
}
// What is folded is printed, too.
addEventListener("beforeprint", () => { for (const d of document.querySelectorAll("details")) d.open = true; });
