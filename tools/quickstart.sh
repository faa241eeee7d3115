#!/usr/bin/env bash
# From nothing to a segmentation by a network that was just pre-trained: virtual environment, synthetic scans, a short
# pre-training without labels, fine-tuning with labels, evaluation of both, pictures. Arguments are overrides of the
# pre-training, such as --max_iterations 200. Interrupted, it goes on where it was.
set -euo pipefail
. "$(dirname "$0")/environment.sh" ""

data=quickstart/phantoms
if [ ! -f $data/fetal.json ]; then
    python -m tools.phantom $data --subjects 5 --shape 64
    python -m tools.datalist $data/all.json --validation 0.2 \
        ct=$data/ct/images t2=$data/fetal/images \
        "t1=$data/brain/images/*_t1.nii.gz" "t1ce=$data/brain/images/*_t1ce.nii.gz" \
        "t2=$data/brain/images/*_t2.nii.gz" "flair=$data/brain/images/*_flair.nii.gz"
    python -m tools.datalist $data/fetal.json t2=$data/fetal/images --labels images=labels --validation 0.2
fi

# train_and_evaluate BUNDLE DATALIST OVERRIDES...: a training leaves a bundle, which evaluates itself.
train_and_evaluate() {
    local run="quickstart/$(basename "$1")_run"
    python -W ignore -m monai.bundle run --config_file "$1/configs/train.json" --bundle_root "$1" \
        --datalist "$2" --output_dir "$run" --num_workers 0 "${@:3}"
    python -W ignore -m monai.bundle run --config_file "['$run/configs/train.json','$run/configs/evaluate.json']" \
        --bundle_root "$run"
}
pretrained=quickstart/dae_pretraining_run
train_and_evaluate bundles/dae_pretraining $data/all.json --feature_size 12 --patch_size "[64,32,32]" \
    --network_def#network#window_size 4 --val_pictures 6 --overlap 0.25 \
    --max_iterations 150 --warmup_iterations 10 --learning_rate 0.004 --val_interval 4 "$@"
[ -d quickstart/fetal ] || python -m tools.adapt $data/fetal.json quickstart/fetal --pretrained $pretrained --minutes 4
train_and_evaluate quickstart/fetal $data/fetal.json --pretrained $pretrained

cat <<END

Look at the restored scans:   quickstart/dae_pretraining_run/evaluation/*.png
Look at the segmentation:     quickstart/fetal_run/evaluation/*.png
Watch the training:           .venv/bin/tensorboard --logdir quickstart
Next, your own scans:         .venv/bin/python -m tools.datalist my_scans.json ct=/folder/of/ct t1=/folder/of/t1
END
