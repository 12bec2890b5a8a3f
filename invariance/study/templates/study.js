for (const button of document.querySelectorAll('th button')) {
  button.addEventListener('click', () => {
    const head = button.closest('th'), table = head.closest('table'), body = table.tBodies[0];
    const column = [...head.parentNode.children].indexOf(head);
    const down = head.getAttribute('aria-sort') === 'ascending';
    for (const other of head.parentNode.children) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
    const value = row => row.children[column].dataset.v ?? '';
    const compare = (a, b) => {
      const x = value(a), y = value(b);
      if (x === '' || y === '') return (x === '') - (y === '');
      const known = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -known : known;
    };
    for (const row of [...body.rows].sort(compare)) body.append(row);
  });
}
const open = () => {
  const found = location.hash && document.getElementById(location.hash.slice(1));
  if (found && found.closest('details')) { found.closest('details').open = true; found.scrollIntoView(); }
};
addEventListener('hashchange', open);
open();
