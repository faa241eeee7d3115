#!/usr/bin/env bash
# From nothing to a picture of scans restored by a network that was just pre-trained: virtual environment, synthetic
# scans, a short pre-training, evaluation. Arguments are overrides of the training, such as --max_iterations 200.
set -euo pipefail
. "$(dirname "$0")/environment.sh" ""

data=quickstart/phantoms
bundle=bundles/dae_pretraining
if [ ! -f $data/datalist.json ]; then
    python -m tools.phantom $data --subjects 6 --shape 64
    python -m tools.datalist $data/datalist.json --validation 0.2 \
        ct=$data/ct/images t2=$data/fetal/images \
        "t1=$data/brain/images/*_t1.nii.gz" "t1ce=$data/brain/images/*_t1ce.nii.gz" \
        "t2=$data/brain/images/*_t2.nii.gz" "flair=$data/brain/images/*_flair.nii.gz"
fi

run() {
    python -W ignore -m monai.bundle run --config_file "$1" --bundle_root $bundle --datalist $data/datalist.json \
        --output_dir quickstart/run --ckpt_dir quickstart/run/models \
        --feature_size 12 --patch_size "[64,64,64]" --num_workers 0 --val_pictures 6 "${@:2}"
}
run $bundle/configs/train.json \
    --max_iterations 120 --warmup_iterations 10 --learning_rate 0.004 --crops_per_volume 1 --val_interval 2 "$@"
run "['$bundle/configs/train.json','$bundle/configs/evaluate.json']" "$@"

cat <<END

Look at the restored scans:   quickstart/run/evaluation/*.png
Watch the training:           .venv/bin/tensorboard --logdir quickstart/run/tensorboard
Next, your own scans:         .venv/bin/python -m tools.datalist my_scans.json ct=/folder/of/ct t1=/folder/of/t1
END
