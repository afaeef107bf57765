//! Products of activations with matrices in ggml's block types, spread over threads.

use lexico::kernels::blocks::{BlockMatrix, GROUP, Panel};
use lexico::threads::{Threads, for_each};

/// Panels that one task multiplies by every group of rows: the group then comes from the caches.
const TASK_PANELS: usize = 8;
/// Bytes of weights that one task works on at least.
const TASK_BYTES: usize = 1 << 15;

/// Products of rows `x` `[m, columns]` with every row of each matrix: `[m, rows]` a matrix, all in one go.
///
/// # Panics
/// Where `x` does not consist of whole rows of each matrix.
pub(crate) fn multiply_all(
    matrices: &[&BlockMatrix],
    x: &[f32],
    threads: &dyn Threads,
) -> Vec<Vec<f32>> {
    let Some(columns) = matrices.first().map(|matrix| matrix.columns()) else {
        return Vec::new();
    };
    let m = x.len() / columns;
    assert_eq!(x.len(), m * columns, "whole rows");
    let outs = matrices.iter().map(|matrix| vec![0f32; m * matrix.rows()]);
    let mut outs: Vec<Vec<f32>> = outs.collect();
    match panels(x, columns, threads).as_slice() {
        [] => {}
        [panel] => by_rows_of_matrix(matrices, panel, &mut outs, threads),
        panels => by_panels(matrices, panels, &mut outs, threads),
    }
    outs
}

fn panels(x: &[f32], columns: usize, threads: &dyn Threads) -> Vec<Panel> {
    let rows: Vec<&[f32]> = x.chunks(Panel::ROWS * columns).collect();
    if rows.len() < 4 {
        return rows.iter().map(|x| Panel::new(x, columns)).collect();
    }
    let mut panels: Vec<Option<Panel>> = rows.iter().map(|_| None).collect();
    for_each(threads, rows.iter().zip(&mut panels), |(x, panel)| {
        *panel = Some(Panel::new(x, columns));
    });
    panels.into_iter().flatten().collect()
}

/// Every task takes some rows of a matrix.
fn by_rows_of_matrix(
    matrices: &[&BlockMatrix],
    panel: &Panel,
    outs: &mut [Vec<f32>],
    threads: &dyn Threads,
) {
    // Some tasks a thread, so that one that is slow, or not there, holds up none.
    let bytes: usize = matrices.iter().map(|matrix| matrix.bytes()).sum();
    let task_bytes = (bytes / (4 * threads.count())).max(TASK_BYTES);
    let m = panel.rows();
    // Results of several rows do not lie together: they are made elsewhere first.
    let mut elsewhere: Vec<Vec<f32>> = match m {
        1 => Vec::new(),
        _ => outs.iter().map(|out| vec![0.0; out.len()]).collect(),
    };
    let groups_of_a_task = |matrix: &BlockMatrix| {
        let group_bytes = matrix.bytes() / matrix.groups().max(1);
        task_bytes.div_ceil(group_bytes.max(1)).max(1)
    };
    let task_groups: Vec<usize> = matrices.iter().map(|m| groups_of_a_task(m)).collect();
    let mut tasks = Vec::new();
    let places = if m == 1 { &mut *outs } else { &mut elsewhere };
    for ((matrix, &groups), out) in matrices.iter().zip(&task_groups).zip(places) {
        for (task, out) in out.chunks_mut(groups * GROUP * m).enumerate() {
            let first = task * groups;
            tasks.push((matrix, first..(first + groups).min(matrix.groups()), out));
        }
    }
    for_each(threads, tasks, |(matrix, groups, out)| {
        let stride = matrix.rows_of(&groups).len();
        matrix.multiply(groups, panel, out, stride);
    });
    let made = matrices.iter().zip(&task_groups).zip(outs).zip(&elsewhere);
    for (((matrix, &groups), out), parts) in made {
        let rows = matrix.rows();
        for (task, part) in parts.chunks(groups * GROUP * m).enumerate() {
            let (first, count) = (task * groups * GROUP, part.len() / m);
            for (r, part) in part.chunks_exact(count).enumerate() {
                out[r * rows + first..][..count].copy_from_slice(part);
            }
        }
    }
}

/// Every task takes some rows of activations.
fn by_panels(
    matrices: &[&BlockMatrix],
    panels: &[Panel],
    outs: &mut [Vec<f32>],
    threads: &dyn Threads,
) {
    let task_panels = panels
        .len()
        .div_ceil(2 * threads.count())
        .clamp(1, TASK_PANELS);
    let mut tasks = Vec::new();
    for (matrix, out) in matrices.iter().zip(outs) {
        let out = out.chunks_mut(task_panels * Panel::ROWS * matrix.rows());
        let parts = panels.chunks(task_panels).zip(out);
        tasks.extend(parts.map(|(panels, out)| (matrix, panels, out)));
    }
    for_each(threads, tasks, |(matrix, panels, out)| {
        let rows = matrix.rows();
        for group in 0..matrix.groups() {
            let outs = out.chunks_mut(Panel::ROWS * rows);
            for (panel, out) in panels.iter().zip(outs) {
                matrix.multiply(group..group + 1, panel, &mut out[group * GROUP..], rows);
            }
        }
    });
}
