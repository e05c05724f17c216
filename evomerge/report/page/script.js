for (const button of document.querySelectorAll('.copy')) {
  button.addEventListener('click', () => {
    const pre = button.parentElement.querySelector('pre');
    const done = () => { button.textContent = 'Copied'; setTimeout(() => { button.textContent = 'Copy'; }, 1500); };
    const select = () => { getSelection().selectAllChildren(pre); if (document.execCommand('copy')) done(); };
    // A page from disk may be refused the clipboard; a selection always works.
    if (navigator.clipboard) navigator.clipboard.writeText(pre.textContent).then(done, select); else select();
  });
}
const filters = document.querySelector('.filters');
if (filters) {
  const items = [...document.querySelectorAll('.item')], shown = document.querySelector('.shown');
  const show = () => {
    const [change, task, words] = [...filters.querySelectorAll('select, input')].map(e => e.value.toLowerCase());
    let count = 0;
    for (const item of items) {
      const fits = (!change || item.dataset.change === change) && (!task || item.dataset.task.toLowerCase() === task)
        && (!words || item.textContent.toLowerCase().includes(words));
      item.hidden = !fits;
      count += fits;
    }
    shown.textContent = `${count} of ${items.length} shown`;
  };
  filters.addEventListener('input', show);
  show();
}
